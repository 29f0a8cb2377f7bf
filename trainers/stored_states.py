"""Canonical states as data: a folder of Parquet shards and its manifest.

Letters: W words of a row, K knots, D coordinates a knot.

A shard has consecutive rows of what was read: the columns of the input, ``id`` (the number of the row where the input
has no such column), ``words`` (a list of strings; the input's own list of words is this column) and ``states``. A row
of ``states`` holds W·K·D numbers of ``bits`` bits: little-endian float16, or codes whose lowest bits come first.

``manifest.json`` says what the states depend on: host, space, method version, how words are cut, the input. Its digest
is in every shard, so that shards of two runs never mix.
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
RUN_KEY = b"unihyperlora_run"  # in the footer of a shard: the digest of its manifest
FLOAT_BITS = 16
# The step of uniform levels that loses least of a normal variable of unit variance (Max, 1960).
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
BITS = (*STEPS, FLOAT_BITS)


def encode(states: np.ndarray, bits: int) -> bytes:
    """Coordinates of unit variance, (W, K, D), as a row of ``states`` holds them."""
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
    """What the states of a folder depend on.

    Attributes:
        space: name, version and digest.
        host: what ``hosts.describe_host`` says.
        tokenizer: digest of all that the host's words depend on beside its weights.
        max_seq_length: most sub-tokens that the host read at once.
        bits: of a number in ``states``.
        knots, dim: K and D.
        rows, rows_a_shard: in all, and in every shard but the last.
        input: what was read: name, split, column, and digest of all rows.
        method: version of lining up.
        format: of the folder.
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
        """The numbers of a shard's rows."""
        return range(shard * self.rows_a_shard, min(self.rows, (shard + 1) * self.rows_a_shard))

    def is_complete(self, folder: Path, shard: int) -> bool:
        """Whether a shard is there, of this run and with all its rows.

        Raises:
            DataError: a file of its name is there that is of another run, or no Parquet file.
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
                f"{path} is of another run than {folder / MANIFEST}. Delete it, or read into a new folder."
            )
        return True

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            DataError: there is none, it is damaged, or it is of another version of the folder or of lining up.
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
                raise DataError(f"{path} has format {content.get('format')!r}, this package reads {FORMAT}.")
            manifest = cls(**{name: value for name, value in content.items() if name != "digest"})
            if manifest.digest != content["digest"]:
                raise DataError(f"{path} was changed by hand: its content is not what its digest says. Read again.")
        except (AdapterFileError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no manifest of canonical states ({first_line(error)}).") from error
        if manifest.method != METHOD:
            raise DataError(
                f"The states in {folder} were made by version {manifest.method} of lining up, this package has "
                f"version {METHOD}, and the coordinates of the two are not the same. Read the text again."
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Raises AdapterFileError where the folder cannot be written."""
        write_json(folder / MANIFEST, asdict(self) | {"digest": self.digest})


def write_shard(path: Path, manifest: Manifest, columns: pa.Table, words: list[list[str]], states: list) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: of the shard.
        manifest: of its folder.
        columns: what is carried along of the input.
        words, states: of each row, as ``model.read`` returns them.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    packed = [encode(row, manifest.bits) for row in states]
    table = columns.append_column("words", pa.array(words, pa.list_(pa.string())))
    table = table.append_column("states", pa.array(packed, pa.large_binary()))
    table = table.replace_schema_metadata({RUN_KEY: manifest.digest.encode()})
    for left_behind in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        left_behind.unlink(missing_ok=True)
    try:
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", use_dictionary=False, write_page_checksum=True)
    except AdapterFileError as error:
        raise DataError(
            f"{error} The shards before it are complete: the same command again goes on with this one."
        ) from error


class StoredCorpus:
    """A folder of canonical states, all of whose shards are there.

    Rows are read from memory-mapped Arrow files in the cache folder, into which the shards are unpacked once.

    Args:
        folder: that `unihyperlora read` wrote.

    Attributes:
        manifest: of the folder.

    Raises:
        DataError: no such folder, of another version, or a shard is missing, damaged or of another run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        shards = range(self.manifest.shards)
        missing = [shard for shard in shards if not self.manifest.is_complete(self.folder, shard)]
        if missing:
            first = self.manifest.path(self.folder, missing[0]).name
            raise DataError(
                f"{self.folder} lacks {len(missing)} of its {len(shards)} shards, the first of them {first}: it was "
                "not read to its end. Run the command that read it again; it goes on where it stopped."
            )

    def check_space(self, space: CanonicalSpace) -> None:
        """Raise ``DataError`` unless the states are of this space."""
        own = self.manifest.space
        if own["digest"] != space.digest:
            raise DataError(
                f"The states in {self.folder} are of the space '{own['name']}' {own['version']} ({own['digest']}), "
                f"the adapter is of '{space.name}' {space.version} ({space.digest}): their coordinates mean other "
                "things. Give the file of that space with --space, or read the text again."
            )

    @cached_property
    def _table(self) -> datasets.Dataset:
        paths = [str(self.manifest.path(self.folder, shard)) for shard in range(self.manifest.shards)]
        checked = ParquetFragmentScanOptions(page_checksum_verification=True)
        try:
            return datasets.Dataset.from_parquet(
                paths, cache_dir=str(cache_folder() / "stored"), fragment_scan_options=checked
            )
        except Exception as error:  # the library raises many types; each means that a shard cannot be read
            cause = error.__cause__ or error
            raise DataError(
                f"The shards in {self.folder} cannot be read ({first_line(cause)}). Delete the damaged one and run "
                "the command that read them again."
            ) from error

    @cached_property
    def _states(self) -> datasets.Dataset:
        return self._table.select_columns(["states"]).with_format("arrow")

    @property
    def columns(self) -> list[str]:
        return self._table.column_names

    def rows(self, *columns: str) -> Iterator[tuple]:
        """Of every row what some columns hold, without its states."""
        for batch in self._table.select_columns([*columns]).iter(1000):
            yield from zip(*(batch[name] for name in columns), strict=True)

    def states(self, row: int, words: int) -> torch.Tensor:
        """(W, K, D) float32 of a row of so many words."""
        stored = self._states[row]["states"][0].as_buffer()
        shape = (words, self.manifest.knots, self.manifest.dim)
        return torch.from_numpy(decode(stored, self.manifest.bits, shape))
