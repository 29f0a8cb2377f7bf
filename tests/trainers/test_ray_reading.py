"""Reading on a local Ray cluster: the same bytes as by one process. Needs the extra ``ray``."""

import json
from pathlib import Path

import pytest

from modeling_unihyperlora import CanonicalSpace, ConfigError
from tests.scripts.test_run_ner import ROWS
from trainers import ray_reading
from trainers.reading_job import CorpusReader, ReadingJob


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(ray_reading, "ray", None)
    with pytest.raises(ConfigError, match="unihyperlora\\[ray\\]"):
        ray_reading.read_on_ray(ReadingJob("host", "input", "output"), 2)


def test_no_worker_reads_nothing(monkeypatch):
    monkeypatch.setattr(ray_reading, "ray", object())
    with pytest.raises(ConfigError, match="--ray_workers 0"):
        ray_reading.read_on_ray(ReadingJob("host", "input", "output"), 0)


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(tiny_host, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of the workers
    anchors, rows = tmp_path / "anchors.txt", tmp_path / "rows.jsonl"
    anchors.write_text("".join(" ".join(words) + "\n" for words, _ in ROWS), encoding="utf-8")
    CanonicalSpace.make([str(tiny_host)], anchors, dim=16).save(tmp_path / "space.safetensors")
    rows.write_text("".join(json.dumps({"tokens": words}) + "\n" for words, _ in ROWS), encoding="utf-8")

    def job(name: str) -> ReadingJob:
        where = (str(tiny_host), str(rows), str(tmp_path / name))
        return ReadingJob(*where, rows_a_shard=10, space=str(tmp_path / "space.safetensors"))

    reader = CorpusReader(job("one"))
    for shard in range(reader.manifest.shards):
        reader.read_shard(shard)
    CorpusReader(job("ray")).read_shard(2)  # a reading that was stopped
    try:
        found = ray_reading.read_on_ray(job("ray"), 2)
        assert (found["shards"], found["shards_read"]) == (5, 4) and found["words_read"] == 7 * 38
        assert ray_reading.read_on_ray(job("ray"), 2)["shards_read"] == 0
    finally:
        ray.shutdown()
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.parquet")} for name in ("one", "ray")}
    assert files["one"] == files["ray"] and len(files["one"]) == 5
