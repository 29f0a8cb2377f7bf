"""Reads a corpus into a folder of canonical states, with one or several processes; an interrupted reading can resume.

A shard's number decides which process reads it. The content of a shard depends only on the manifest, not on the number
of processes. Processes never wait for each other.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from filelock import FileLock
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_unihyperlora import UniHyperLoraModel
from modeling_unihyperlora.corpus.reading import states_of, text_column, words_of
from modeling_unihyperlora.errors import AdapterFileError, ConfigError, DataError, first_line
from modeling_unihyperlora.hosts import describe_host, load_host, window_of
from modeling_unihyperlora.space import KNOTS
from modeling_unihyperlora.words import WordReader, load_tokenizer

from .reading import JSON_SUFFIXES, UNKNOWN_ID, json_rows, load_split
from .sources import causal_copy_of
from .stored_states import BITS, MANIFEST, Manifest, write_shard

BUILDERS = {**dict.fromkeys(JSON_SUFFIXES, "json"), ".csv": "csv", ".parquet": "parquet"}
OWN_COLUMNS = ("words", "states")  # columns that the folder adds
AT_ONCE = 1000  # rows per batch of the check


@dataclass(frozen=True)
class ReadingJob:
    """Settings of a reading: host, input and output.

    Attributes:
        host: folder or Hub id.
        input: a .jsonl, .json, .csv or .parquet file, or a data set of the Hub.
        output: folder of the states.
        split: split of the data set; "train[:1000]" takes the first rows, also of a file.
        config_name: configuration of the data set.
        column: column with texts or lists of words; see ``corpus.reading.text_column``.
        bits: bits per number, one of ``stored_states.BITS``.
        rows_a_shard: rows per shard.
        max_seq_length: maximum number of sub-tokens that the host reads at once.
        batch_size: windows that the host reads at once.
        space: file of the canonical space; None for the package's space.
        causal: read the causal copy of an encoder, see ``sources.CausalCopy``.
    """

    host: str
    input: str
    output: str
    split: str = "train"
    config_name: str | None = None
    column: str | None = None
    bits: int = 16
    rows_a_shard: int = 2048
    max_seq_length: int = 128
    batch_size: int = 32
    space: str | None = None
    causal: bool = False

    def check(self) -> None:
        """Raise ``ConfigError`` for a number that is not allowed."""
        if self.bits not in BITS:
            raise ConfigError(f"bits {self.bits} is not allowed; choose one of {', '.join(map(str, BITS))}.")
        for name in ("rows_a_shard", "max_seq_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not allowed; give 1 or more.")


class CorpusReader:
    """A host that reads the shards of a job.

    The constructor checks everything, including every row, before the host reads.

    Args:
        job: the reading's settings.

    Attributes:
        manifest: manifest of the folder; written if the folder has none yet.

    Raises:
        ConfigError, DataError, HostError
    """

    def __init__(self, job: ReadingJob):
        job.check()
        self.job, self.folder = job, Path(job.output)
        self.rows = load_rows(job)
        self.column = text_column(self.rows.column_names, job.column)
        taken = [name for name in OWN_COLUMNS if name in self.rows.column_names and name != self.column]
        if taken:
            raise ConfigError(
                f"{job.input} has a column '{taken[0]}', as the folder of states has one of its own. Rename it."
            )
        digest, words = self._check_rows()
        tokenizer = load_tokenizer(job.host)
        self.model = UniHyperLoraModel.from_host(self._host(tokenizer), tokenizer=tokenizer, space=job.space)
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type
            self.model.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))))
        self.manifest = self._manifest(digest)
        self._require_room(words)
        self._agree()

    def _host(self, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The host, or its causal copy."""
        host = load_host(self.job.host)
        if not self.job.causal:
            return host
        made = causal_copy_of(host, WordReader(host, tokenizer))
        if made is None:
            raise ConfigError(
                f"{self.job.host} cannot be read under a causal mask: it is a decoder, or its family takes no such "
                "mask. Leave --causal out."
            )
        return made[0]

    def _check_rows(self) -> tuple[str, int]:
        """Check all rows; returns their digest and their approximate number of words."""
        digest, words, number = hashlib.sha256(), 0, 0
        try:
            for batch in self.rows.iter(AT_ONCE):
                for row in batch[self.column]:
                    if isinstance(row, str):
                        row.encode()
                        words += len(row.split())
                    else:
                        words += len(words_of(row, f"{self.job.input}, row {number}"))
                    number += 1
                digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
        except UnicodeError as error:  # Arrow accepts half of a surrogate pair, but cannot return it
            raise DataError(
                f"{self.job.input}, rows {number} to {number + AT_ONCE}: a text has half of a surrogate pair in it "
                f"({first_line(error)}), which is no character. Write the file again in UTF-8."
            ) from error
        return digest.hexdigest()[:16], words

    def _manifest(self, digest: str) -> Manifest:
        stream, job = self.model.bound_stream, self.job
        words, space = stream.words, self.model.adapter.space
        window = window_of(self.model.host, words.tokenizer) or job.max_seq_length
        name = Path(job.input).name if Path(job.input).exists() else job.input
        return Manifest(
            space={"name": space.name, "version": space.version, "digest": space.digest},
            host=describe_host(self.model.host, job.host, words.num_layers),
            tokenizer=hashlib.sha256(words.key().encode()).hexdigest()[:16],
            max_seq_length=min(job.max_seq_length, window),
            bits=job.bits,
            knots=len(KNOTS),
            dim=space.shape()["dim"],
            rows=len(self.rows),
            rows_a_shard=job.rows_a_shard,
            input={"name": name, "split": job.split, "column": self.column, "digest": digest},
        )

    def _require_room(self, words: int) -> None:
        """Raise ``DataError`` if the disk has no space for the states of this number of words."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        there = sum(path.stat().st_size for path in self.folder.glob("states-*.parquet"))
        needed = words * self.manifest.knots * self.manifest.dim * self.manifest.bits // 8 - there
        free = shutil.disk_usage(place).free
        if needed > free:
            raise DataError(
                f"The states of {words:,} words need about {needed / 1e9:.1f} GB more, but {self.folder} has "
                f"{free / 1e9:.1f} GB left. Free some, choose another disk, or store fewer bits (--bits)."
            )

    def _agree(self) -> None:
        """Write the manifest, or check that the existing one is the same.

        Raises:
            DataError: the existing manifest differs, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{MANIFEST}.lock"):
                if not (self.folder / MANIFEST).is_file():
                    self.manifest.save(self.folder)
        except (OSError, AdapterFileError) as error:
            raise DataError(
                f"{self.folder} cannot be written ({first_line(error)}). Choose another folder."
            ) from error
        known = Manifest.load(self.folder)
        if known.digest != self.manifest.digest:
            names = [name for name in vars(known) if getattr(known, name) != getattr(self.manifest, name)]
            told = "; ".join(
                f"{name}: {getattr(known, name)} there, {getattr(self.manifest, name)} now" for name in names
            )
            raise DataError(
                f"{self.folder} holds the states of another run ({told}). Read into a new folder, or give what that "
                "run had."
            )

    @cached_property
    def _carried(self) -> datasets.Dataset:
        """Columns of the input that are copied to the shards."""
        rows = self.rows
        if not isinstance(rows.features[self.column], datasets.Value):
            rows = rows.remove_columns(self.column)  # "words" has the same content
        return rows

    def to_do(self, shards: Iterable[int]) -> list[int]:
        """Return the incomplete ones of these shards.

        Raises:
            DataError: a shard's file is from another run, or is not a Parquet file.
        """
        return [shard for shard in shards if not self.manifest.is_complete(self.folder, shard)]

    def read_shard(self, shard: int, progress: Callable[[int, float], None] | None = None) -> int:
        """Read and write a shard; returns its number of words.

        Args:
            progress: called after every batch with its number of words and their share of the shard.

        Raises:
            DataError: the disk is full.
        """
        numbers = self.manifest.rows_of(shard)
        rows = self.rows[numbers.start : numbers.stop][self.column]
        origins = (f"{self.job.input}, row {number}" for number in numbers)
        sentences = [words_of(row, origin) for row, origin in zip(rows, origins, strict=True)]
        total = sum(map(len, sentences))
        tell = None if progress is None else lambda words: progress(words, words / total)
        states = states_of(self.model, sentences, self.manifest.max_seq_length, self.job.batch_size, tell)
        columns = named_classes(self._carried.with_format("arrow")[numbers.start : numbers.stop], self.rows.features)
        if "id" not in columns.column_names:
            own = pa.table({"id": pa.array(numbers, pa.int64())})
            columns = pa.table({name: table[name] for table in (own, columns) for name in table.column_names})
        write_shard(self.manifest.path(self.folder, shard), self.manifest, columns, sentences, states)
        return total


def own_shards(shards: int) -> range:
    """Shards of this process; rank and number of processes come from torchrun's environment variables."""
    return range(int(os.environ.get("RANK", 0)), shards, int(os.environ.get("WORLD_SIZE", 1)))


def load_rows(job: ReadingJob) -> datasets.Dataset:
    """Load the input, memory-mapped.

    Raises:
        DataError: the input cannot be loaded, or has no rows; for a JSON-lines file the message names the line.
    """
    path = Path(job.input)
    if not path.is_file():
        rows = load_split(job.input, job.split, job.config_name)
    elif path.suffix.lower() not in BUILDERS:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}'. Give {', '.join(BUILDERS)}, or a data set of the Hub."
        )
    else:
        kind = BUILDERS[path.suffix.lower()]
        how = {"keep_default_na": False} if kind == "csv" else {}  # "NA" is a word
        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split=job.split, **how)
        except Exception as error:  # the library raises some twenty types
            if kind == "json":
                for origin, row in json_rows(path, {"text": "Ada spoke."}):
                    words_of(row[text_column(row, job.column)], origin)
            raise DataError(
                f"{path} cannot be read ({first_line(error.__cause__ or error)}). Correct the file."
            ) from error
    if len(rows) == 0:
        raise DataError(f"{job.input} ({job.split}) has no row in it. Give an input with at least one row.")
    return rows


def named_classes(table: pa.Table, features: datasets.Features) -> pa.Table:
    """Replace ids of named classes, also in lists, by their names; unknown ids become null."""

    def name(value, feature):
        if isinstance(value, list):
            return [name(one, feature.feature) for one in value]
        return None if value in (None, UNKNOWN_ID) else feature.int2str(value)

    for at, column in enumerate(table.column_names):
        feature = features[column]
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            names = [name(value, feature) for value in table[column].to_pylist()]
            kind = pa.string() if inner is feature else pa.list_(pa.string())
            table = table.set_column(at, column, pa.array(names, kind))
    return table
