"""Cached states of the words of a data set: the host is frozen, so a stream can be trained and scored without it.

There is one float16 file per host and data set in ``cache_folder()``, named by a digest of both.
It does not depend on an adapter, so all adapters on the host share it. It takes 2·layers·d bytes per word. A killed
computation is resumed; a second process waits for the first.
"""

import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from torch.utils.data import Dataset
from transformers import BatchEncoding, EvalPrediction

from modeling_unihyperlora.errors import DataError
from modeling_unihyperlora.hosts import call_host, fingerprint
from modeling_unihyperlora.space import HostFit, cache_folder, fit_on, layers_read
from modeling_unihyperlora.storage import write_json
from modeling_unihyperlora.words import WordReader

from .ner_windows import IGNORED
from .sampling import TOGETHER

logger = logging.getLogger(__name__)

SAVE_EVERY = 20  # batches
KEPT_BYTES = 1e9  # maximum bytes of canonical states in memory, per host or causal copy


class WordStates:
    """The words of all windows, their states on disk, and their labels.

    Args:
        host: the encoder or decoder; it is not kept.
        words: how its words are read.
        windows: the data set; items have ``input_ids`` and ``labels``, one a sub-token or one a window, and
            ``word_index`` where the words were given.
        layers: which of the L+1 states; those that a map reads by default.
        bf16: read the host under autocast to bfloat16, which is faster on a CPU that has it.
        batch_size: different texts that the host reads at a time. Windows with the same ids are one text, such as a
            sentence with the words of its data set, and the same sentence with the words of raw text.

    Attributes:
        layers: indices of the kept hidden states.
        offsets: (windows + 1,) index of each window's first word.
        starts: for each window, the positions of its words' first sub-tokens.
        labels: for each window, the labels of its words, or the window's label.
        cpu_seconds: CPU time for computing the states; near zero if they were cached.

    Raises:
        DataError: the cache folder has no room, or cannot be written.
    """

    def __init__(
        self,
        host: nn.Module,
        words: WordReader,
        windows: Dataset,
        layers: list[int] | None = None,
        bf16: bool = False,
        batch_size: int = 32,
    ):
        self.bf16 = bf16
        self.layers = layers = layers_read(words.num_layers) if layers is None else layers
        items = [windows[index] for index in range(len(windows))]
        self.starts = _starts(words, items)
        self.offsets = np.cumsum([0, *map(len, self.starts)])
        self.labels = [_labels(item["labels"], at) for item, at in zip(items, self.starts, strict=True)]
        shape = (int(self.offsets[-1]), len(layers), host.config.hidden_size)
        start = time.process_time()
        path = cache_folder() / f"states-{_digest(host, words, layers, items, bf16)}.f16"
        try:
            locks = path.parent / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / path.name):
                if not path.is_file() or path.stat().st_size != 2 * int(np.prod(shape)):
                    self._compute(path, shape, host, words, items, batch_size)
        except OSError as error:
            raise DataError(
                f"The host's states cannot be cached in {path.parent} ({error}). Set UNIHYPERLORA_CACHE to a writable "
                "folder."
            ) from error
        self._path, self._shape = path, shape
        self.cpu_seconds = time.process_time() - start

    def states(self, first: int, end: int) -> np.ndarray:
        """States (end - first, layers, d) float16 of some words, from the disk.

        Raises:
            DataError: the file has been removed.
        """
        numbers = int(np.prod(self._shape[1:]))
        try:
            read = np.fromfile(self._path, np.float16, int(end - first) * numbers, offset=2 * int(first) * numbers)
            return read.reshape(end - first, *self._shape[1:])
        except (OSError, ValueError) as error:
            raise DataError(
                f"The host's cached states in {self._path} cannot be read ({error}). Start the run again; the states "
                "are then computed anew."
            ) from error

    def _compute(self, path: Path, shape, host, words: WordReader, items, batch_size) -> None:
        needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
        part, progress = path.with_suffix(".part"), path.with_suffix(".json")
        if not part.is_file() and needed > free:
            raise DataError(
                f"The host's states of {len(items)} windows take {needed / 1e9:.1f} GB, but {path.parent} has only "
                f"{free / 1e9:.1f} GB left. Free some, set UNIHYPERLORA_CACHE to another disk, or use fewer sentences."
            )
        done = _progress(part, progress, needed, batch_size)
        texts: dict[tuple, list[int]] = {}  # text → its windows
        for index, item in enumerate(items):
            texts.setdefault(_text(item), []).append(index)
        order = sorted(texts.values(), key=lambda windows: len(items[windows[0]]["input_ids"]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        logger.info("Computing the host's states of %d windows once, %.2f GB, in %s", len(items), needed / 1e9, path)
        host.eval()
        with open(part, "r+b" if done else "w+b") as file:  # no memory map: its pages would count as memory in use
            file.truncate(needed)
            for number, chosen in enumerate(batches[done:], start=done + 1):
                with torch.autocast(host.device.type, torch.bfloat16, enabled=self.bf16):
                    windows_of_texts = [[items[index] for index in windows] for windows in chosen]
                    read, lengths = read_words(host, words, self.layers, windows_of_texts)
                for row, index in enumerate(itertools.chain.from_iterable(chosen)):
                    file.seek(int(self.offsets[index]) * needed // max(1, shape[0]))
                    file.write(read[row, : lengths[row]].cpu().numpy().tobytes())
                if number % SAVE_EVERY == 0 or number == len(batches):
                    file.flush()
                    os.fsync(file.fileno())
                    write_json(progress, {"text_batches": number, "batch_size": batch_size})
                    logger.info("%d of %d batches", number, len(batches))
        os.replace(part, path)
        progress.unlink()


class CanonicalStates(Dataset):
    """Canonical states of words, computed with the current maps.

    Results are kept in memory until the maps change (2·K·D bytes per word and map); beyond ``KEPT_BYTES`` they are
    computed each time.

    Args:
        words: the host's states.
        fits: returns the current maps into the canonical space; each map gives a view of every window.
    """

    def __init__(self, words: WordStates, fits: Callable[[], list[HostFit]]):
        self.words = words
        self.fits = fits
        self._maps: list[HostFit] = []  # the maps of the kept results, as ``fits`` gave them
        self._made: dict[int, torch.Tensor] = {}
        self._room = 0.0

    def __getstate__(self) -> dict:
        """Pickle the current maps, without the kept results."""
        return vars(self) | {"fits": functools.partial(list, self.fits()), "_maps": [], "_made": {}, "_room": 0.0}

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.words.labels)

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        """``canonical_states`` (W, K, D) and ``labels``, (W,) or a scalar.

        Args:
            key: ``view * len(self) + index`` of a window; view 0 is the first map's.
        """
        view, index = divmod(key, len(self))
        fits = self.fits()
        if [*map(id, fits)] != [*map(id, self._maps)]:
            self._maps = [*fits]
            self._made, self._room = {}, KEPT_BYTES
        made = self._made
        if key not in made:
            first = index // TOGETHER * TOGETHER
            several = range(first, min(first + TOGETHER, len(self)))
            made = self._make(view, several if self._room > 0 else range(index, index + 1))
            self._room -= sum(z.nbytes for z in made.values())
            if self._room > 0:
                self._made |= made
        return {"canonical_states": made[key].float(), "labels": torch.from_numpy(self.words.labels[index])}

    def _make(self, view: int, windows: range) -> dict[int, torch.Tensor]:
        """Key → canonical states (W, K, D) float16, for one view of some windows."""
        offsets, fit = self.words.offsets[windows.start : windows.stop + 1], fit_on("cpu", self._maps[view])
        states = torch.from_numpy(self.words.states(offsets[0], offsets[-1])).float()
        z = fit(dict(zip(self.words.layers, states.unbind(1), strict=True))).half()
        parts = z.unflatten(1, (len(fit.knots), -1)).split(np.diff(offsets).tolist())
        return {view * len(self) + index: part for index, part in zip(windows, parts, strict=True)}


def scores_of_words(words: WordStates, compute: Callable[[EvalPrediction], dict]) -> Callable[[EvalPrediction], dict]:
    """Turn a ``compute_metrics`` for sub-tokens into one for predictions on cached states.

    Args:
        words: the evaluated states.
        compute: takes logits (windows, T, C) and label ids (windows, T).
    """

    def on_tokens(values: np.ndarray) -> np.ndarray:  # (windows, W, …) → (windows, T, …)
        tokens = 1 + max(at[-1] for at in words.starts)
        spread = np.full((len(values), tokens, *values.shape[2:]), IGNORED, dtype=values.dtype)
        for row, at in enumerate(words.starts):
            spread[row, at] = values[row, : len(at)]
        return spread

    def compute_words(prediction: EvalPrediction) -> dict:
        if np.ndim(prediction.label_ids) == 1:  # one label a sentence
            return compute(prediction)
        return compute(EvalPrediction(on_tokens(prediction.predictions), on_tokens(prediction.label_ids)))

    return compute_words


class StreamCollator:
    """Makes batches of cached states, padded to W words, or of token ids with another collator."""

    def __init__(self, for_tokens: Callable | None = None):
        self.for_tokens = for_tokens

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        if "canonical_states" not in items[0]:
            return self.for_tokens(items)
        pad = torch.nn.utils.rnn.pad_sequence
        masks = [torch.ones(len(item["canonical_states"]), dtype=torch.long) for item in items]
        batch = {
            "canonical_states": pad([item["canonical_states"] for item in items], batch_first=True),
            "attention_mask": pad(masks, batch_first=True),
        }
        if "labels" not in items[0]:
            return batch
        labels = [item["labels"] for item in items]
        return batch | {"labels": torch.stack(labels) if labels[0].dim() == 0 else pad(labels, True, IGNORED)}


@torch.no_grad()
def read_words(
    host: nn.Module, words: WordReader, layers: list[int], texts: list[list[dict]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (N, W, layers, d) float16 of the words of N windows, and the number of words per window (N,).

    ``texts`` has the windows of each text; the host reads a text once.
    """
    known = inspect.signature(host.forward).parameters
    items = [item for windows in texts for item in windows]
    inputs = {name: value.to(host.device) for name, value in _padded(words, items).items()}
    mask = inputs.pop("attention_mask")
    places = words.places(inputs["input_ids"], mask, inputs.get("word_index"))
    first = [*itertools.accumulate(map(len, texts[:-1]), initial=0)]  # a window of each text
    given = {name: value[first] for name, value in inputs.items() if name in known}
    hidden = call_host(host, mask[first], output_hidden_states=True, **given).hidden_states
    rows = [row for row, windows in enumerate(texts) for _ in windows]
    row = torch.tensor(rows, device=mask.device)[:, None]
    return torch.stack([hidden[layer][row, places.read] for layer in layers], dim=2).half(), places.lengths


def _text(item: dict) -> tuple:
    """All that a host reads of a window."""
    return tuple(tuple(item[name]) for name in sorted(item) if name not in ("labels", "word_index"))


def _starts(words: WordReader, items: list[dict], together: int = 256) -> list[list[int]]:
    """For each window, the positions of its words' first sub-tokens."""
    starts: list[list[int]] = []
    for first in range(0, len(items), together):
        batch = _padded(words, items[first : first + together])
        places = words.places(batch["input_ids"], batch["attention_mask"], batch.get("word_index"))
        rows = zip(places.first.tolist(), places.lengths.tolist(), strict=True)
        starts += [row[:count] for row, count in rows]
    return starts


def _padded(words: WordReader, items: list[dict]) -> BatchEncoding:
    """A batch of windows, without their labels."""
    inputs = [{name: item[name] for name in item if name != "labels"} for item in items]
    return words.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")


def _labels(labels, positions: list[int]) -> np.ndarray:
    labels = np.asarray(labels, np.int64)
    return labels if labels.ndim == 0 else labels[positions]


def _progress(part: Path, progress: Path, size: int, batch_size: int) -> int:
    """Number of batches that an interrupted computation has finished."""
    try:
        kept = json.loads(progress.read_text(encoding="utf-8"))
        usable = part.stat().st_size == size and kept["batch_size"] == batch_size
        return int(kept["text_batches"]) if usable else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _digest(host: nn.Module, words: WordReader, layers: list[int], items: list[dict], bf16: bool) -> str:
    digest = hashlib.sha256(f"{fingerprint(host)} {layers} {words.key()}{' bf16' if bf16 else ''}".encode())
    for item in items:
        for name in sorted(set(item) - {"labels"}):
            digest.update(name.encode() + np.array(item[name], dtype=np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:24]
