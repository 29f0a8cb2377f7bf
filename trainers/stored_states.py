"""Canonical states as data: a folder of Parquet shards and its manifest.

Letters: W words of a row, K knots, D coordinates per knot.

A shard has consecutive rows: the columns of the input, ``id`` (the row's number if the input has no such column),
``words`` (a list of strings; replaces the input's list of words) and ``states``. A row of ``states`` has W·K·D numbers
of ``bits`` bits: little-endian float16, or codes with the lowest bits first.

``manifest.json`` records everything that the states depend on: host, space, method version, word splitting, input. Its
digest is in every shard, so that shards of two runs never mix.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow.dataset import ParquetFragmentScanOptions

from modeling_unihyperlora.errors import AdapterFileError, DataError, first_line
from modeling_unihyperlora.space import METHOD, CanonicalSpace, cache_folder
from modeling_unihyperlora.storage import read_json_object, replacing, write_json

FORMAT = 1
MANIFEST = "manifest.json"
RUN_KEY = b"unihyperlora_run"  # key of the manifest's digest in a shard's footer
FLOAT_BITS = 16
# Step of the uniform quantiser with the smallest error for a normal variable of unit variance (Max, 1960).
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
BITS = (*STEPS, FLOAT_BITS)


def encode(states: np.ndarray, bits: int) -> bytes:
    """Encode coordinates of unit variance, (W, K, D), as a row of ``states``."""
    if bits == FLOAT_BITS:
        return states.astype("<f2").tobytes()
    levels = np.floor(states.astype(np.float32).reshape(-1) / STEPS[bits]) + 2 ** (bits - 1)
    codes = levels.clip(0, 2**bits - 1).astype(np.uint8)
    return np.packbits(codes[:, None] >> np.arange(bits, dtype=np.uint8) & 1, bitorder="little").tobytes()


def decode(stored: bytes, bits: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Inverse of ``encode``: (W, K, D) float32."""
    if bits == FLOAT_BITS:
        return np.frombuffer(stored, "<f2").astype(np.float32).reshape(shape)
    count = int(np.prod(shape))
    flat = np.unpackbits(np.frombuffer(stored, np.uint8), count=count * bits, bitorder="little").reshape(-1, bits)
    codes = flat @ (1 << np.arange(bits, dtype=np.uint8))
    return ((codes.astype(np.float32) + (0.5 - 2 ** (bits - 1))) * STEPS[bits]).reshape(shape)


@dataclass(frozen=True)
class Manifest:
    """Everything that the states of a folder depend on.

    Attributes:
        space: name, version and digest.
        host: description by ``hosts.describe_host``.
        tokenizer: digest of everything besides the weights that the states of words depend on.
        max_seq_length: maximum number of sub-tokens that the host read at once.
        bits: bits per number in ``states``.
        knots, dim: K and D.
        rows, rows_a_shard: total number of rows, and rows in every shard except the last.
        input: name, split and column of the input, and digest of all rows.
        method: version of the alignment method.
        format: version of the folder's format.
    """

    space: dict[str, str | int]
    host: dict[str, object]
    tokenizer: str
    max_seq_length: int
    bits: int
    knots: int
    dim: int
    rows: int
    rows_a_shard: int
    input: dict[str, str | None]
    method: str = METHOD
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256, 16 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_a_shard)

    def path(self, folder: Path, shard: int) -> Path:
        return folder / f"states-{shard:05d}-of-{self.shards:05d}.parquet"

    def rows_of(self, shard: int) -> range:
        """Numbers of a shard's rows."""
        return range(shard * self.rows_a_shard, min(self.rows, (shard + 1) * self.rows_a_shard))

    def is_complete(self, folder: Path, shard: int) -> bool:
        """Whether a shard exists, belongs to this run and has all its rows.

        Raises:
            DataError: the file is from another run, or is not a Parquet file.
        """
        path = self.path(folder, shard)
        if not path.is_file():
            return False
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path} is no readable Parquet file ({first_line(error)}). Delete it and read the corpus again: what "
                "is complete is kept."
            ) from error
        if (footer.metadata or {}).get(RUN_KEY) != self.digest.encode() or footer.num_rows != len(self.rows_of(shard)):
            raise DataError(
                f"{path} and {folder / MANIFEST} are from different runs. Delete the shard, or read into a new folder."
            )
        return True

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Load the manifest of a folder.

        Raises:
            DataError: the manifest is missing or damaged, or has another version of the format or the alignment.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{folder} holds no canonical states: it has no {MANIFEST}. Give a folder that `unihyperlora read` "
                "wrote."
            )
        try:
            content = read_json_object(path)
            if content.get("format") != FORMAT:
                raise DataError(f"{path} has format {content.get('format')!r}, but this package reads {FORMAT}.")
            manifest = cls(**{name: value for name, value in content.items() if name != "digest"})
            if manifest.digest != content["digest"]:
                raise DataError(f"{path} was changed by hand: its digest does not match. Read the text again.")
        except (AdapterFileError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a manifest of canonical states ({first_line(error)}).") from error
        if manifest.method != METHOD:
            raise DataError(
                f"The states in {folder} are from version {manifest.method} of the alignment, but this package has "
                f"version {METHOD}, whose coordinates differ. Read the text again."
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Write the manifest; raises ``AdapterFileError`` if the folder cannot be written."""
        write_json(folder / MANIFEST, asdict(self) | {"digest": self.digest})


def write_shard(path: Path, manifest: Manifest, columns: pa.Table, words: list[list[str]], states: list) -> None:
    """Write a shard, completely or not at all.

    Args:
        path: path of the shard.
        manifest: manifest of the folder.
        columns: columns of the input to copy.
        words, states: words and states of each row, as ``model.read`` returns them.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    packed = [encode(row, manifest.bits) for row in states]
    table = columns.append_column("words", pa.array(words, pa.list_(pa.string())))
    table = table.append_column("states", pa.array(packed, pa.large_binary()))
    table = table.replace_schema_metadata({RUN_KEY: manifest.digest.encode()})
    for left_behind in path.parent.glob(f".{path.name}.*"):  # temporary files of killed processes
        left_behind.unlink(missing_ok=True)
    try:
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", use_dictionary=False, write_page_checksum=True)
    except AdapterFileError as error:
        raise DataError(
            f"{error} The shards before it are complete: give the same command again to resume with this one."
        ) from error


class StoredCorpus:
    """A complete folder of canonical states.

    The shards are unpacked once to memory-mapped Arrow files in the cache folder, from which rows are read.

    Args:
        folder: folder that `unihyperlora read` wrote.

    Attributes:
        manifest: manifest of the folder.

    Raises:
        DataError: the folder does not exist or has another version, or a shard is missing, damaged or from another
            run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        shards = range(self.manifest.shards)
        missing = [shard for shard in shards if not self.manifest.is_complete(self.folder, shard)]
        if missing:
            first = self.manifest.path(self.folder, missing[0]).name
            raise DataError(
                f"{self.folder} lacks {len(missing)} of its {len(shards)} shards, the first of them {first}: the "
                "reading is not complete. Give the command that read it again; it resumes where it stopped."
            )

    def check_space(self, space: CanonicalSpace) -> None:
        """Raise ``DataError`` unless the states belong to this space."""
        own = self.manifest.space
        if own["digest"] != space.digest:
            raise DataError(
                f"The states in {self.folder} have the space '{own['name']}' {own['version']} ({own['digest']}), but "
                f"the adapter has '{space.name}' {space.version} ({space.digest}): their coordinates mean different "
                "things. Give the file of the states' space with --space, or read the text again."
            )

    @cached_property
    def _table(self) -> datasets.Dataset:
        paths = [str(self.manifest.path(self.folder, shard)) for shard in range(self.manifest.shards)]
        checked = ParquetFragmentScanOptions(page_checksum_verification=True)
        try:
            return datasets.Dataset.from_parquet(
                paths, cache_dir=str(cache_folder() / "stored"), fragment_scan_options=checked
            )
        except Exception as error:  # many types; all mean that a shard cannot be read
            cause = error.__cause__ or error
            raise DataError(
                f"The shards in {self.folder} cannot be read ({first_line(cause)}). Delete the damaged one and give "
                "the command that read them again."
            ) from error

    @cached_property
    def _states(self) -> datasets.Dataset:
        return self._table.select_columns(["states"]).with_format("arrow")

    @property
    def columns(self) -> list[str]:
        return self._table.column_names

    def rows(self, *columns: str) -> Iterator[tuple]:
        """Yield the values of these columns, row by row, without reading the states."""
        for batch in self._table.select_columns([*columns]).iter(1000):
            yield from zip(*(batch[name] for name in columns), strict=True)

    def states(self, row: int, words: int) -> torch.Tensor:
        """States of a row that has this number of words, (W, K, D) float32."""
        stored = self._states[row]["states"][0].as_buffer()
        shape = (words, self.manifest.knots, self.manifest.dim)
        return torch.from_numpy(decode(stored, self.manifest.bits, shape))
