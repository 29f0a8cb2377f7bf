"""Records and pictures of the speed benchmark; no test depends on timing."""

import argparse
import json

import pytest
import torch

from modeling_unihyperlora import CanonicalSpace, ConfigError, HostError
from modeling_unihyperlora.hosts import load_host
from modeling_unihyperlora.measure.accounting import added_multiply_adds
from modeling_unihyperlora.space import KNOTS
from modeling_unihyperlora.words import load_tokenizer
from scripts.research import benchmark, race, speed, speed_report, speed_stream
from scripts.research.speed_contenders import Ground, texts


@pytest.fixture
def space(tiny_host, monkeypatch, tmp_path) -> str:
    """A small space on the tiny host, and a separate cache."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    words = [word for word in load_tokenizer(str(tiny_host)).get_vocab() if word.isalpha()]
    (tmp_path / "anchors.txt").write_text("\n".join(" ".join(words[n % 9 :]) for n in range(40)))
    path = tmp_path / "space.safetensors"
    CanonicalSpace.make([load_host(str(tiny_host))], tmp_path / "anchors.txt", dim=8).save(path)
    return str(path)


class Clock:
    """A clock that the contenders advance."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(race.time, "process_time", lambda: self.now)

    def takes(self, *seconds: float):
        turns = iter(range(10**6))

        def contender() -> None:
            self.now += seconds[next(turns) % len(seconds)]

        return contender


def test_ratios_are_medians_over_turns_with_their_quartiles(monkeypatch):
    clock = Clock(monkeypatch)
    found = race.race({"host": clock.takes(1.0), "slow": clock.takes(3.0, 2.0, 2.0, 1.0, 2.5)}, 200.0, "cpu")
    assert found["rounds"] == race.MOST_ROUNDS and found["first_ms"] == 1000.0
    assert found["slow"]["ratio"] == 2.0 and found["slow"]["quartiles"] == [2.0, 2.5]
    assert found["slow"]["more_ms"] == 1000.0 and "host" not in found


def test_the_fast_run_several_times_a_turn(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    fast = clock.takes(0.001)
    race.race({"host": clock.takes(0.1), "fast": lambda: (calls.append(1), fast())}, 10.0, "cpu")
    assert len(calls) > 20 * race.LEAST_ROUNDS


def test_what_takes_too_long_is_left_out_and_says_so(monkeypatch):
    clock = Clock(monkeypatch)
    found = race.race({"host": clock.takes(10.0), "slow": clock.takes(10.0)}, 20.0, "cpu")
    assert list(found) == ["left_out"] and "20 s" in found["left_out"]


def test_an_exponent_is_that_of_the_power():
    assert speed._exponent([1, 2, 4], [3.0, 12.0, 48.0]) == 2.0
    assert speed._exponent([1, 2], [1.0, -1.0]) is None and speed._exponent([1], [1.0]) is None


def test_batches_are_running_text_without_padding(tiny_host):
    batch = Ground(str(tiny_host)).batch(3, 16)
    assert batch["input_ids"].shape == (3, 16) and bool(batch["attention_mask"].all())
    assert [len(words) for words in texts(4, 30)] == [30] * 4
    assert len({len(words) for words in texts(20, None)}) > 5


def test_latency_is_written_with_all_contenders(tiny_host, tmp_path, space, monkeypatch):
    monkeypatch.setattr(race, "SHORTEST", 1e-9)
    output = tmp_path / "latency.json"
    threads = torch.get_num_threads()
    flags = ["--output", str(output), "--batches", "2", "--lengths", "16", "--seconds", "20", "--threads", "1"]
    flags += ["--space", space, "--reader", "small"]
    benchmark.main(["latency", "--model_name_or_path", str(tiny_host), "--peers", "lora", "lora_merged", *flags])
    torch.set_num_threads(threads)
    record = json.loads(output.read_text())
    assert record["kind"] == "speed" and record["threads"] == 1 and str(tmp_path) not in output.read_text()
    (cell,) = record["cells"]
    assert {"stream", "inject", "inject_merged", "lora", "lora_merged"} < set(cell) and cell["rounds"] >= 5


def test_parts_are_of_the_stream_that_runs(tiny_host, space, monkeypatch):
    """Their multiply-adds are those that are accounted for, and δθ's, which is zero here, is left out."""
    monkeypatch.setattr(race, "SHORTEST", 1e-9)
    monkeypatch.setattr(speed_stream, "PART_SHAPES", ((2, 16),))
    ground = Ground(str(tiny_host), reader="small", space=space)
    found = speed_stream.parts(ground, argparse.Namespace(seconds=10.0, device="cpu"))
    assert set(found["cells"][0]) > {"stream", *speed_report.PARTS}
    model = ground.pathway_model("stream")
    adds = speed_stream.multiply_adds_of_parts(model)
    dim = model.config.space["dim"]
    assert sum(adds.values()) == added_multiply_adds(model) - len(KNOTS) * dim * dim


def test_many_tasks_are_raced_beside_lora(tiny_host, space, monkeypatch):
    for name, value in (("TASKS", (1, 3)), ("PASSES", 2), ("MANY_SHAPE", (3, 16))):
        monkeypatch.setattr(speed_stream, name, value)
    monkeypatch.setattr(race, "SHORTEST", 1e-9)
    ground = Ground(str(tiny_host), reader="small", space=space)
    found = speed_stream.many(ground, argparse.Namespace(seconds=20.0, device="cpu"))
    ways = {"one_pass_1", "one_pass_3", "mixed_3", "lora_merged_passes_2", "lora_passes_2", "lora_mixed_2"}
    assert ways < set(found) and found["batch"] == 3


def test_start_needs_an_adapter_and_measures_whole_processes(tiny_host, space):
    with pytest.raises(ConfigError, match="--adapter DIR"):
        speed_stream.start(Ground(str(tiny_host), space=space), argparse.Namespace(adapter=None))
    cost = speed_stream.process_cost(["--version"])
    assert cost["printed"].startswith("unihyperlora ") and cost["cpu_seconds"] > 0 and cost["peak_mb"] > 5
    with pytest.raises(RuntimeError, match="no subcommand 'nothing'"):
        speed_stream.process_cost(["nothing"])


def test_a_training_step_of_every_contender_trains_its_own(tiny_host, space):
    ground = Ground(str(tiny_host), reader="small", space=space)
    for name in ("stream", "stream_delta", "inject_delta", "lora"):
        step = ground.step(name, texts(4, 12), 16)
        model = step.__closure__[[*step.__code__.co_freevars].index("model")].cell_contents
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        step(range(4))
        step(range(4))
        changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
        assert changed and not any(key.startswith("host.") for key in changed)
        if name.endswith("delta"):
            assert changed == {"adapter.tasks.default.delta.latent"}


def cell(batch: int, tokens: int | None, **ratios: float) -> dict:
    own = {name: {"ratio": r, "quartiles": [r - 0.01, r + 0.01], "more_ms": 1.0} for name, r in ratios.items()}
    return {"batch": batch, "tokens": tokens, "rounds": 7, "first_ms": 12.5} | own


def a_record(what: str, **content) -> dict:
    host = {"name": "host-a", "family": "bert", "hidden_size": 64, "num_layers": 2}
    rest = {"device": "cpu", "threads": 1, "trained_adapter": False, "versions": {"torch": "2", "peft": "1"}}
    return {"kind": "speed", "what": what, "host": host, **rest, **content}


def test_the_page_has_every_table_and_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    spread = {"ratio": 1.5, "quartiles": [1.4, 1.6]}
    marks = {"peak_mb": 900.0, "peak_ratio": 0.8, "peak_ratio_range": [0.79, 0.81]}
    marks |= {f"peak_over_loaded_{key}": value for key, value in (("mb", 9.0), ("ratio", 0.3))}
    marks |= {"peak_over_loaded_ratio_range": [0.2, 0.4]}
    point = {"blocks": 2, "width": 64, "tokens": 16, "first_ms": 3.0, "stream": spread, "inject": spread}
    timed = {"seconds": 0.25, "quartiles": [0.2, 0.3], "ratio_quartiles": [1.0, 2.0]}
    records = {
        "speed-latency": a_record(
            "latency",
            first="host",
            cells=[
                cell(8, 16, stream=1.04, inject=1.1),
                cell(8, 128, stream=1.03, inject=1.12),
                {"batch": 32, "tokens": 512, "left_out": "5 rounds would take more than 20 s"},
            ],
        ),
        "speed-parts": a_record(
            "parts",
            first="host",
            cells=[cell(1, 16, stream=1.2, **dict.fromkeys(speed_report.PARTS, 0.02))],
            multiply_adds_pct_at_128_tokens={"linear_map": 1.0, "reader": 2.5},
        ),
        "speed-many": a_record(
            "many", reader="small", **cell(32, 32, one_pass_10=1.3, lora_merged_passes_10=9.9), first="host"
        ),
        "speed-start": a_record(
            "start",
            rounds=3,
            equal_entities=True,
            host_bytes=90_000_000,
            reader_bytes=370_000,
            torch={"cpu_seconds": 6.5, "peak_mb": 700.0},
            onnx={"cpu_seconds": 0.9, "peak_mb": 250.0},
        ),
        "speed-train": a_record("train", first="lora", cells=[cell(32, None, stream=0.05)]),
        "speed-slopes": a_record(
            "slopes",
            batch=8,
            curves={"blocks": {"points": [point], "exponents": {"host": 1.0, "stream": 0.2, "inject": None}}},
        ),
        "speed-memory": a_record("memory", rounds=2, batch=8, tokens=128, stream=marks),
        "speed-calibrate": a_record(
            "calibrate",
            calibrate=timed | {"ratio_to_host_on_anchors": 1.3},
            load_adapter=timed | {"ratio_to_load_host": 2.5},
            host_on_anchors=timed,
            load_host=timed,
        ),
        "speed-size": a_record(
            "size",
            stream={
                "bytes": 5,
                "bytes_over_lora": 0.5,
                "bytes_by_part": {"space": 3, "reader": 2},
                "flops_overhead_pct_by_tokens": {"128": 4.0},
            },
            reader_bytes={"small": 36, "large": 330},
            inject={"bytes": 6, "bytes_over_lora": 0.6, "flops_overhead_pct_by_tokens": {"128": 3.0}},
            lora={"bytes": 10, "flops_overhead_pct_by_tokens": {"128": 3.1}},
        ),
    }
    speed_report.write(records, tmp_path)
    page = (tmp_path / "speed.md").read_text()
    for text in (
        "| 8 × 128 | 1.030 [1.020, 1.040] | 1.120 [1.110, 1.130] | 12.5 | 7 |",
        "Left out: 32 × 512",
        "| whole stream | 1.200 [1.190, 1.210] | 103.50 |",
        "| reader | 0.020 [0.010, 0.030] | 2.50 |",
        "| stream, tasks for every sentence: 10 | 1.300 [1.290, 1.310] |",
        "| LoRA r=8, merged, passes: 10 | 9.900 [9.890, 9.910] |",
        "| ONNX files, without torch | 0.90 | 250 |",
        "reader's 370,000; both find the same entities",
        "| 32 × sentences as they are | 0.050",
        "| blocks | 2 | 1.00 | 0.20 | – |",
        "| stream | 0.800 [0.790, 0.810] | 900 |",
        "| 2.500 [1.000, 2.000] | 0.250 |",
        "| stream | 5 | 0.500 | 4.00 % at 128 |",
        "Bytes of the stream: reader 2, space 3.",
        "Bytes of a task's reader by its size: small 36, large 330.",
        "On a GPU: not measured.",
    ):
        assert text in page, text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_host_is_one_clear_error(tmp_path):
    with pytest.raises(HostError, match="nowhere"):
        benchmark.main(
            ["size", "--model_name_or_path", str(tmp_path / "nowhere"), "--output", str(tmp_path / "f.json")]
        )
    assert not (tmp_path / "f.json").exists()
