"""Tags and classifies texts with the ONNX files of a host and a reader, from ``unihyperlora export-onnx``.

It needs numpy, onnxruntime and tokenizers, but loads neither torch nor transformers.

Letters: B batch, T tokens, C labels.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .findings import ClassifiedText, TaggedText, Tagger, WordCutter, classified, in_batches
from .windows import cut

FORMAT = "1"  # format that ``modeling_unihyperlora.publish.onnx_file`` writes
KEY = "unihyperlora"  # key of the metadata


class OnnxFileError(Exception):
    """An ONNX file cannot be used; the message says what was given, what is allowed and what to do."""


class OnnxReader:
    """A host and the reader of one task.

    Args:
        host_path: the host's file; its tokenizer must be beside it (host.tokenizer.json for host.onnx).
        reader_path: the reader's file.

    Raises:
        OnnxFileError: a file is missing, is of another kind, or cannot be run, or the files do not belong together.
    """

    def __init__(self, host_path: str | Path, reader_path: str | Path):
        self._host, self.host = _opened(host_path, "host")
        self._reader, self.reader = _opened(reader_path, "reader")
        _check_pair(self.host, self.reader, host_path, reader_path)
        self.tokenizer = _tokenizer_of(host_path, self.host)
        self.labels: list[str] = self.reader["labels"]
        self._words = WordCutter(self.host["cut"])

    def tag(self, texts: Sequence[str], *, max_seq_length: int = 128, batch_size: int = 32) -> list[TaggedText]:
        """Tag raw texts; a text without words has no entities.

        Args:
            texts: raw text.
            max_seq_length: maximum number of sub-tokens in a window, including special tokens; longer texts are read
                in overlapping windows.
            batch_size: number of windows that the host reads at once.

        Raises:
            OnnxFileError: the reader does not tag, or no word fits into ``max_seq_length``.
        """
        self._check_type("token_classification", texts)
        places = [self._words(text) for text in texts]
        words = [[text[start:end] for start, end in at] for text, at in zip(texts, places, strict=True)]
        before, after = self._special_ids()
        room = self._length(max_seq_length) - len(before) - len(after)
        if room < 1:
            raise OnnxFileError(f"max_seq_length={max_seq_length} leaves no room for a word. Choose a larger one.")
        windows = [
            window
            for number, pieces in enumerate(self._pieces(words))
            for window in cut(number, [word[:room] for word in pieces], room, before, after)
        ]
        parts: list[list[np.ndarray]] = [[np.zeros((0, len(self.labels)), np.float32)] for _ in texts]
        logits = self._scores([window.input_ids for window in windows], batch_size)
        for window, row in zip(windows, logits, strict=True):
            parts[window.sentence].append(row[window.starts])
        found = Tagger(self.labels, self.reader["scheme"])
        return [found(*row) for row in zip(texts, places, map(np.concatenate, parts), strict=True)]

    def classify(
        self, texts: Sequence[str], *, max_seq_length: int = 128, batch_size: int = 32
    ) -> list[ClassifiedText]:
        """Classify raw texts.

        Args:
            texts: raw text.
            max_seq_length: maximum number of sub-tokens of a text; the end of a longer text is left out.
            batch_size: number of texts that the host reads at once.

        Raises:
            OnnxFileError: the reader does not classify, a text is empty, or ``max_seq_length`` leaves no room.
        """
        self._check_type("sequence_classification", texts)
        length = self._length(max_seq_length)
        if length <= self.tokenizer.num_special_tokens_to_add(is_pair=False):
            raise OnnxFileError(f"max_seq_length={max_seq_length} leaves no room for a word. Choose a larger one.")
        if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
            raise OnnxFileError(f"Text {empty[0]} of {len(texts)} is empty. Leave empty texts out.")
        self.tokenizer.enable_truncation(length)
        encoded = [self.tokenizer.encode(text) for text in texts]
        self.tokenizer.no_truncation()
        logits = self._scores([text.ids for text in encoded], batch_size)
        return [classified(text, self.labels, row) for text, row in zip(texts, logits, strict=True)]

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Ids and mask, (B, T) int64 → logits (B, T, C), or (B, C) if the reader classifies."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        names = [output.name for output in self._host.get_outputs()]
        states = dict(zip(names, self._host.run(None, given), strict=True))
        asked = [given.name for given in self._reader.get_inputs()]
        return self._reader.run(["logits"], {name: states[name] for name in asked})[0]

    def _scores(self, rows: list[list[int]], batch_size: int) -> list[np.ndarray]:
        """Logits of each row of ids, in order; rows of similar length share a batch."""

        def score(numbers: list[int]) -> np.ndarray:
            longest = max(len(rows[number]) for number in numbers)
            ids = np.full((len(numbers), longest), self.tokenizer.padding["pad_id"], np.int64)
            mask = np.zeros_like(ids)
            for at, number in enumerate(numbers):
                ids[at, : len(rows[number])], mask[at, : len(rows[number])] = rows[number], 1
            return self.logits(ids, mask)

        return in_batches([len(row) for row in rows], batch_size, score)

    def _pieces(self, sentences: list[list[str]]) -> Iterator[list[list[int]]]:
        """Sub-token ids of each word of each sentence; every word has at least one sub-token."""
        for words in sentences:
            encoded = self.tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False)
            pieces: list[list[int]] = [[] for _ in words]
            for number, word in zip(encoded.ids, encoded.word_ids, strict=True):
                pieces[word].append(number)
            if not all(pieces) and self.host["unknown_id"] is None:
                raise OnnxFileError(
                    "The host's tokenizer returns no token for a word, and it has no unknown token. Use another host."
                )
            yield [piece or [self.host["unknown_id"]] for piece in pieces]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Ids of the special tokens that the tokenizer adds before and after a text."""
        encoded = self.tokenizer.encode(["a"], is_pretokenized=True)
        ids, special = encoded.ids, encoded.special_tokens_mask
        if 0 not in special:
            return ids, []
        return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]

    def _length(self, asked: int) -> int:
        return min(asked, self.host["window"] or asked)

    def _check_type(self, wanted: str, texts: Sequence[str]) -> None:
        if self.reader["type"] != wanted:
            raise OnnxFileError(
                f"The reader's task '{self.reader['task']}' is {self.reader['type']}, but {wanted} was asked for. "
                "Give a reader of that type."
            )
        if not all(isinstance(text, str) for text in texts):
            raise OnnxFileError("ONNX files read raw text, not words or pairs. Leave --runtime onnx out.")


def _opened(path: str | Path, kind: str):
    """Open a file; returns the session and the file's metadata.

    Raises:
        OnnxFileError: the file cannot be run here, or is of another kind.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise OnnxFileError(f"There is no file {path}. Give the {kind}'s file that unihyperlora export-onnx wrote.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        # Without the paths of onnxruntime's source files:
        said = re.sub(r"/onnxruntime_src/.*\) ", "", " ".join(str(error).split()))[:300]
        raise OnnxFileError(
            f"{path} cannot be run by onnxruntime {onnxruntime.__version__} ({said}). If the file is damaged, write "
            "it again. If it has operators that this version does not know: pip install -U onnxruntime."
        ) from error
    said = _json(session.get_modelmeta().custom_metadata_map.get(KEY))
    if said.get("kind") != kind:
        is_what = f"the file of a {said['kind']}" if "kind" in said else "not a file of a host or a reader"
        raise OnnxFileError(
            f"{path} is {is_what}; a {kind}'s file is needed. Write both files with: unihyperlora export-onnx ADAPTER "
            "reader.onnx --host_file host.onnx"
        )
    if said.get("format") != FORMAT:
        raise OnnxFileError(
            f"{path} has format {said.get('format')!r}, but this version of unihyperlora reads {FORMAT!r}. Write it "
            "again with this version, or install the version that wrote it."
        )
    return session, said


def _json(text: str | None) -> dict[str, Any]:
    try:
        said = json.loads(text or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _check_pair(host: dict[str, Any], reader: dict[str, Any], host_path, reader_path) -> None:
    """Raise ``OnnxFileError`` if a reader cannot read the output of a host's file."""
    if host["space"] != reader["space"]:
        raise OnnxFileError(
            f"{reader_path} reads the space '{reader['space_name']}' ({reader['space']}), but {host_path} gives "
            f"'{host['space_name']}' ({host['space']}): their coordinates mean different things. Write the host's "
            "file with an adapter of the reader's space."
        )
    if reader["map"] in (None, host["map"]):
        return
    if reader["fingerprint"] != host["fingerprint"]:
        raise OnnxFileError(
            f"{reader_path} was tuned (δθ) on the host '{reader['host']}' ({reader['fingerprint']}), but {host_path} "
            f"has '{host['host']}' ({host['fingerprint']}). Give that host's file, or a reader whose δθ is zero."
        )
    raise OnnxFileError(
        f"{reader_path} was tuned (δθ) on the map {reader['map']} of its host, but {host_path} has the map "
        f"{host['map']}: one of the two is older. Write both again from one adapter."
    )


def _tokenizer_of(host_path: str | Path, host: dict[str, Any]) -> Tokenizer:
    """Load the tokenizer beside a host's file.

    Raises:
        OnnxFileError: it is missing, or was not written with the host's file.
    """
    path = Path(host_path).with_suffix(".tokenizer.json")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OnnxFileError(
            f"The host's tokenizer {path} cannot be read ({error}). Put it beside {host_path}."
        ) from error
    if hashlib.sha256(text.encode()).hexdigest() != host["tokenizer_sha256"]:
        raise OnnxFileError(f"{path} is not the tokenizer that {host_path} was written with. Write both again.")
    return Tokenizer.from_str(text)
