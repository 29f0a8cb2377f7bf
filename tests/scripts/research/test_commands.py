"""Every command of scripts/research has --help, and commands without training measure a tiny host in seconds."""

import importlib
import json
import sys

import pytest

from modeling_unihyperlora import CanonicalSpace
from scripts.research import benchmark, kill_and_resume
from scripts.research.scaling_tables import slope_table, task_table
from tests.conftest import WORDS

SCRIPTS = (
    *("ablation", "benchmark", "fuzz_adapter", "host_families", "kill_and_resume", "launch_check"),
    *("make_space", "pruned_hosts", "transfer"),
)
COMMANDS = (
    "record",
    "paper",
    "tasks",
    "scaling",
    "latency",
    "slopes",
    "train",
    "memory",
    "calibrate",
    "size",
    "render",
)


@pytest.mark.parametrize(
    "line", [[name] for name in SCRIPTS] + [["benchmark", name] for name in COMMANDS], ids="-".join
)
def test_help(line, monkeypatch, capsys):
    script, *rest = line
    monkeypatch.setattr(sys, "argv", [script, *rest, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"scripts.research.{script}").main()
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.fixture
def flags(tiny_host, tmp_path, monkeypatch) -> list[str]:
    """A tiny host, a small space on it, a file to write, and a cache of the test's own."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "anchors.txt").write_text("\n".join(" ".join(WORDS[n % 9 :]) for n in range(40)))
    CanonicalSpace.make([tiny_host], tmp_path / "anchors.txt", dim=8).save(tmp_path / "space.safetensors")
    own = ["--model_name_or_path", tiny_host, "--space", tmp_path / "space.safetensors"]
    return [*map(str, own), "--output", str(tmp_path / "out.json")]


def test_many_tasks_in_one_pass_and_mixed(flags, tmp_path):
    benchmark.main(["tasks", *flags, "--tasks", "1", "5", "--rounds", "2", "--batch_size", "4", "--tokens", "6"])
    record = json.loads((tmp_path / "out.json").read_text())
    ways = {(row["pathway"], row["way"], row["tasks"]) for row in record["rows"]}
    mixed = {(pathway, "mixed batch", n) for pathway in ("inject", "stream") for n in (1, 5)}
    assert ways == mixed | {("stream", "one pass", n) for n in (1, 5)}
    assert all(row["least"] <= row["ratio"] <= row["greatest"] for row in record["rows"])
    lines = task_table(record)
    assert "| tasks | inject, mixed batch | stream, mixed batch | stream, one pass |" in lines
    assert any(line.startswith("| 5 |") for line in lines) and str(tmp_path) not in json.dumps(record)


def test_how_costs_grow(flags, tiny_host, tmp_path):
    sizes = ["--tokens", "4", "8", "--sentences", "2", "4", "--batches", "2", "4", "--rounds", "1"]
    benchmark.main(["scaling", *flags, "--hosts", str(tiny_host), *sizes])
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["rows"]) == 5 and all(len(row["seconds"]) == 2 for row in record["rows"])
    (host,) = record["calibrations"]
    assert (host["blocks"], host["width"]) == (2, 64) and host["seconds"] > 0
    assert any(line.startswith(f"| {tiny_host.name} | 2 × 64 |") for line in slope_table(record))


def test_bytes_and_lining_up(flags, tmp_path):
    benchmark.main(["size", *flags, "--reader", "small"])
    record = json.loads((tmp_path / "out.json").read_text())
    parts, readers = record["stream"]["bytes_by_part"], record["reader_bytes"]
    assert readers["small"] < readers["medium"] < readers["large"] and readers["small"] == parts["reader"]
    assert {"space", "reader", "head", "delta"} == parts.keys()
    benchmark.main(["calibrate", *flags, "--reader", "small"])
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["calibrate"]["seconds"] > 0 and record["layers_read"] == 3


def test_a_tiny_run_knows_its_stages(tmp_path):
    log = tmp_path / "log"
    assert kill_and_resume.stage(log) == 0
    log.write_text("getting ready")
    assert kill_and_resume.stage(log) == 0
    log.write_text("{'loss': 0.5}")
    assert kill_and_resume.STAGES[kill_and_resume.stage(log)] == "training"


@pytest.mark.slow
def test_a_killed_stream_ends_as_one_that_was_not(tmp_path):
    kill_and_resume.make_host(tmp_path / "host")
    kill_and_resume.make_data(tmp_path / "train.jsonl", 60)
    kill_and_resume.make_space(tmp_path)
    for scope in ("task", "delta"):
        assert kill_and_resume.kill_and_compare("stream", scope, 1, tmp_path, 0)["identical"]
