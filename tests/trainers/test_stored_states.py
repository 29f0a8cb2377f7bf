"""The folder of stored states: codes of numbers, the manifest, shards that are missing, damaged or of another run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modeling_unihyperlora import CanonicalSpace, DataError
from modeling_unihyperlora.space import METHOD
from trainers.stored_states import BITS, STEPS, Manifest, StoredCorpus, decode, encode, write_shard

SHAPE = (7, 5, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))


def normal(shape=SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("bits", sorted(STEPS))
def test_codes_are_the_nearest_levels_of_a_float64_reference(bits):
    z = 2 * normal((40, 5, 12))
    levels = (np.arange(2**bits) - 2 ** (bits - 1) + 0.5) * STEPS[bits]
    nearest = levels[np.abs(z[..., None] - levels).argmin(-1)]
    found = decode(encode(z, bits), bits, z.shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, nearest, atol=1e-5)
    np.testing.assert_array_equal(decode(encode(found, bits), bits, z.shape), found)  # again the same


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_as_many_as_the_bits_say(bits):
    assert len(encode(normal((4, 5, 12)), bits)) == 4 * 5 * 12 * bits // 8
    assert len(encode(normal((1, 5, 1)), bits)) == -(-5 * bits // 8)  # the last byte is filled up
    assert decode(encode(normal((0, 5, 3)), bits), bits, (0, 5, 3)).shape == (0, 5, 3)


def test_float16_is_kept_as_it_is():
    z = normal().astype(np.float16)
    np.testing.assert_array_equal(decode(encode(z, 16), 16, SHAPE), z.astype(np.float32))


def test_the_step_loses_least():
    z = np.random.default_rng(0).standard_normal(100_000)

    def error(bits: int, step: float) -> float:
        levels = np.clip(np.floor(z / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
        return float(np.square(levels * step - z).mean())

    for bits, step in STEPS.items():
        assert error(bits, step) < min(error(bits, 0.93 * step), error(bits, 1.07 * step))


def manifest(rows: int = 5, **given) -> Manifest:
    host = {"name": "a/host", "family": "bert", "hidden_size": 8, "num_layers": 2, "fingerprint": "f" * 16}
    kept = {"space": {"name": "own", "version": 1, "digest": "d" * 16}, "host": host, "tokenizer": "t" * 16}
    kept |= {"max_seq_length": 128, "bits": 16, "knots": 5, "dim": 3, "rows": rows, "rows_a_shard": 2}
    return Manifest(
        **kept | {"input": {"name": "x.jsonl", "split": "train", "column": "tokens", "digest": "i"}} | given
    )


def write(folder: Path, kept: Manifest, shards=None) -> list[np.ndarray]:
    """Shards whose row r has r words."""
    folder.mkdir(exist_ok=True)
    kept.save(folder)
    states = [normal((row, 5, 3), row).astype(np.float16) for row in range(kept.rows)]
    for shard in range(kept.shards) if shards is None else shards:
        rows = kept.rows_of(shard)
        columns = pa.table({"id": list(rows), "label": [f"class {row % 2}" for row in rows]})
        words = [[f"w{number}" for number in range(row)] for row in rows]
        write_shard(kept.path(folder, shard), kept, columns, words, [states[row] for row in rows])
    return states


@pytest.mark.parametrize("bits", BITS)
def test_what_is_written_is_read(tmp_path, bits):
    kept = manifest(bits=bits)
    states = write(tmp_path / "s", kept)
    corpus = StoredCorpus(tmp_path / "s")
    assert corpus.manifest == kept
    rows = list(corpus.rows("id", "words", "label"))
    assert rows[3] == (3, ["w0", "w1", "w2"], "class 1") and len(rows) == 5
    for row, z in enumerate(states):
        found = corpus.states(row, row)
        assert found.dtype == torch.float32 and found.shape == (row, 5, 3)
        np.testing.assert_array_equal(found.numpy(), decode(encode(z, bits), bits, z.shape))


def test_missing_shards_are_named(tmp_path):
    write(tmp_path / "s", manifest(), [0, 2])
    with pytest.raises(DataError, match="lacks 1 of its 3 shards, the first of them states-00001-of-00003.parquet"):
        StoredCorpus(tmp_path / "s")


def test_a_shard_of_another_run_is_refused(tmp_path):
    write(tmp_path / "s", manifest())
    manifest(max_seq_length=64).save(tmp_path / "s")
    with pytest.raises(DataError, match="states-00000-of-00003.parquet and .* are from different runs"):
        StoredCorpus(tmp_path / "s")


def test_a_cut_shard_is_refused(tmp_path):
    write(tmp_path / "s", manifest())
    path = manifest().path(tmp_path / "s", 1)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="states-00001-of-00003.parquet is no readable Parquet file"):
        StoredCorpus(tmp_path / "s")


def test_a_byte_that_was_changed_is_found(tmp_path):
    kept = manifest(rows=40, rows_a_shard=40)
    write(tmp_path / "s", kept)
    path = kept.path(tmp_path / "s", 0)
    column = pq.read_metadata(path).row_group(0)
    [states] = [column.column(i) for i in range(column.num_columns) if column.column(i).path_in_schema == "states"]
    content = bytearray(path.read_bytes())
    content[states.data_page_offset + states.total_compressed_size - 5] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        StoredCorpus(tmp_path / "s").states(1, 1)


def test_states_of_another_version_are_refused(tmp_path):
    write(tmp_path / "s", manifest(method="1"))
    with pytest.raises(DataError, match=f"from version 1 of the alignment, but this package has version {METHOD}"):
        StoredCorpus(tmp_path / "s")


def test_a_folder_of_another_format_is_refused(tmp_path):
    write(tmp_path / "s", dataclasses.replace(manifest(), format=9))
    with pytest.raises(DataError, match="has format 9, but this package reads 1"):
        StoredCorpus(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content | {"rows": 4}, "was changed by hand"),
        (lambda content: {"format": 1}, "is not a manifest"),
        (lambda content: [], "is not a manifest"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(tmp_path, change, said):
    write(tmp_path / "s", manifest())
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=said):
        StoredCorpus(tmp_path / "s")


def test_any_other_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no canonical states"):
        StoredCorpus(tmp_path)


def test_states_of_another_space_are_refused(tmp_path):
    write(tmp_path / "s", manifest())
    space = CanonicalSpace("other", 2, 300, 10, 3)
    with pytest.raises(DataError, match=f"'own' 1 \\(dddd.*'other' 2 \\({space.digest}\\).*--space"):
        StoredCorpus(tmp_path / "s").check_space(space)
