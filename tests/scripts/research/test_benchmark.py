"""Records of runs, and the tables rendered from them."""

import json

import pytest

from modeling_unihyperlora import ConfigError
from scripts.research import benchmark
from scripts.research.records import SETTINGS, ablation_of, keep_paper_run, read_records, record_of
from scripts.research.results_tables import best_lora, pages, summary

ADAPTER = {"pathway": "inject", "projector": "dimension", "source_hosts": [{"name": "/somewhere/private/host-a"}]}


def rendered(records: dict[str, dict]) -> str:
    return "".join(pages(records).values())


def a_run(folder, seed: int, f1: float, method: str = "unihyperlora"):
    folder.mkdir(parents=True)
    settings = {name: None for name in SETTINGS} | {"method": method, "seed": seed, "lambda_f": 0.001}
    settings |= {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 0.01, "train_scope": "task"}
    data = {"name": "tweets", "splits": {"validation": {"sentences": 3, "sha256": "ab"}}}
    arguments = settings | {"model_name_or_path": "/somewhere/private/host-a", "adapter": None, "data": data}
    (folder / "run_arguments.json").write_text(json.dumps(arguments))
    costs = {
        "adapter_bytes": 118000,
        "head_bytes": 11556,
        "delta_bytes": 512,
        "flops_overhead_pct": 3.4,
        "train_runtime": 9.0,
        "cpu_seconds": 100.0 + 10 * seed,
    }
    costs |= {"reader_bytes": 330000, "host_cpu_seconds": 40.0 + seed, "space": "english 1 abc"}
    results = costs | {"eval_f1": f1, "active_atoms_per_token": 1.5, "bytes_of_delta": 512}
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(ADAPTER if method == "unihyperlora" else {}))
    return folder


def test_seeds_share_a_row_and_other_settings_do_not(tmp_path):
    runs = [a_run(tmp_path / "0", 0, 0.8), a_run(tmp_path / "1", 1, 0.9), a_run(tmp_path / "p", 0, 0.5, "probe")]
    text = rendered({str(i): record_of(run) for i, run in enumerate(runs)})
    rows = [line for line in text.splitlines() if line.startswith("| tweets")]
    assert len(rows) == 2
    both = next(row for row in rows if "| 0, 1 |" in row)
    assert (
        "0.8500 ± 0.0707" in both
        and "118,000 | 330,000 | 11,556 | 512" in both
        and both.endswith("| 105 ± 7 | 40 ± 1 |")
    )
    assert any("probe" in row and "0.5000" in row and "±" not in row for row in rows)
    assert "| delta | 512 |" in text


def test_a_stream_has_no_projector_to_name(tmp_path):
    folder = a_run(tmp_path / "run", 0, 0.8)
    (folder / "config.json").write_text(json.dumps({"pathway": "stream", "projector": None, "source_hosts": []}))
    assert "| tweets, 3 | unihyperlora, stream | host-a | task | 5 × 2 |" in rendered({"0": record_of(folder)})


def test_ranks_of_lora_are_apart(tmp_path):
    runs = []
    for rank in (1, 8):
        folder = a_run(tmp_path / str(rank), 0, 0.8, "lora")
        run = json.loads((folder / "run_arguments.json").read_text()) | {"lora_r": rank}
        (folder / "run_arguments.json").write_text(json.dumps(run))
        runs.append(record_of(folder))
    text = rendered({str(number): run for number, run in enumerate(runs)})
    for rank in (1, 8):
        assert f"| tweets, 3 | lora, r={rank} | host-a | LoRA and head | " in text


def test_ready_adapters_have_a_column_for_each_host():
    adapters = {
        name: {"sentences": {"train": 9, "test": 4, "other": 3}, "bytes": {"adapter_bytes": 570_000}, "f1": scores}
        for name, scores in (
            ("moods", {"a": {"test": 0.9123, "other": 0.5}, "b": {"test": 0.8, "other": 0.25}}),
            ("people", {"a": {"test": 0.75, "other": 0.125}}),
        )
    }
    records = {"ready": {"kind": "ready", "adapters": adapters}}
    assert summary(records).splitlines() == [
        "| adapter | scored on | file, B | a | b |",
        "|---|---|---|---|---|",
        "| `moods` | test, 4 | 570,000 | 0.912 | 0.800 |",
        "| `people` | test, 4 | 570,000 | 0.750 | – |",
    ]
    assert "| moods | other | 3 | b | 0.2500 |" in rendered(records)


def test_a_run_that_only_scores_says_where_its_adapter_is_from(tmp_path):
    adapter, run = a_run(tmp_path / "adapter", 0, 0.8), a_run(tmp_path / "run", 0, 0.6)
    for name, change in (("all_results", {"train_runtime": None}), ("run_arguments", {"adapter": str(adapter)})):
        content = json.loads((run / f"{name}.json").read_text()) | change
        (run / f"{name}.json").write_text(json.dumps(content))
    (run / "config.json").unlink()
    record = record_of(run)
    start = "| tweets, 3 | unihyperlora, inject, dimension |"
    assert f"{start} host-a | trained on this host: tweets, 5 × 2 | – | – | – | 0 | 0.6000 |" in rendered(
        {"0": record}
    )
    moved = rendered({"0": record | {"host": "host-b"}})
    assert f"{start} host-b | zero-shot from host-a: tweets, 5 × 2 | – | – | – | 0 | 0.6000 |" in moved
    content = json.loads((adapter / "run_arguments.json").read_text()) | {"label_smoothing_factor": 0.05}
    (adapter / "run_arguments.json").write_text(json.dumps(content))
    assert "trained on this host: tweets, 5 × 2, label smoothing 0.05 | –" in rendered({"0": record_of(run)})
    (adapter / "run_arguments.json").unlink()  # an adapter from elsewhere
    assert f"{start} host-a | trained on this host | – | – | – | 0 | 0.6000 |" in rendered({"0": record_of(run)})


def test_render_writes_both_pages_from_the_records(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(benchmark, "RESULTS", results)
    (tmp_path / "docs/how-to").mkdir(parents=True)
    for page, (begin, end) in (("README.md", benchmark.MARKS), ("docs/how-to/hosts.md", benchmark.HOST_MARKS)):
        (tmp_path / page).write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    for seed, score in enumerate((0.7, 0.8)):
        benchmark.main(["record", str(a_run(tmp_path / str(seed), seed, score)), "--name", f"run-s{seed}"])
    families = {
        "llama": {"stream_new_thing": "passed"},
        "bert": {"inject_merge": "passed", "inject_compile": "no compiler", "stream_detach": "failed"},
    }
    record = {"kind": "host_families", "families": families, "decoders": ["llama"], "versions": {"torch": "2"}}
    (results / "families.json").write_text(json.dumps(record))
    outcomes = {"cut off": {"refused": 1200, "loaded, equal logits": 3}}
    record = {"kind": "adapter_fuzz", "files": 1203, "seed": 0, "failures": [], "outcomes": outcomes}
    (results / "fuzz.json").write_text(json.dumps(record))
    (tmp_path / "docs/how-to" / "scaling.md").write_text(
        "above\n<!-- launch -->\nold\n<!-- end of launch -->\n<!-- kills -->\nold\n<!-- end of kills -->\nbelow\n"
    )
    (tmp_path / "docs/how-to" / "states.md").write_text(
        "<!-- stored_states -->\nold\n<!-- end of stored_states -->\n<!-- plan -->\nold\n<!-- end of plan -->\nbelow\n"
    )
    shares = {"read_by": ["a"], "rows": 9, "steps": 5, "reader": "small", "cpu_seconds": 20.0, "f1": {"b": 0.5}}
    shares["validation_rows"] = 600
    states = {
        "kind": "stored_states",
        "hardware": {"machine": "x86_64"},
        "task": [shares | {"bits": 4, "bytes_a_word": 160.0, "file_bytes_a_word": 150.0}],
        "speed": {"host": "a", "texts": 64, "words": 6000, "rounds": 9, "ratio": 0.91, "least": 0.9, "greatest": 0.93}
        | {"read_words_a_second": 2000.0, "bare_words_a_second": 2200.0},
        "lora": {"host": "a", "steps": 500, "cpu_seconds": 450.0, "f1": 0.87},
        "several": {
            "read_by": "a",
            "steps": 5,
            "reader": "small",
            "tasks": {"LOC_PER": {"cpu_seconds": 9.0, "f1": 0.25}},
        },
        "workers": {"host": "a", "ways": {"one process": {"shards": 3, "digest": "ab"}, "equal": True}},
    }
    (results / "stored_states.json").write_text(json.dumps(states))
    runs = [{"launch": "ddp_gpu", "pathway": "inject", "not_run": "no GPU"}]
    (results / "launch.json").write_text(json.dumps({"kind": "launch", "runs": runs}))
    benchmark.main(["render"])
    states = (tmp_path / "docs/how-to" / "states.md").read_text()
    assert "\nold\n" not in states and states.endswith("below\n")
    assert "| a | 9 | 4 | 160 | 150 | 5 | small | 20 | 0.5000 |" in states and "| one process | 3 | ab |" in states
    assert "| 1 | LOC, PER | 9 | 0.2500 |" in states and "LoRA r=8 on a takes 450 CPU s for 500 steps" in states
    assert "| 4 | 150 | 310 |" in states and "139 core hours" in states
    hosts = (tmp_path / "docs/how-to" / "hosts.md").read_text()
    scaling = (tmp_path / "docs/how-to" / "scaling.md").read_text()
    assert "| ddp_gpu | inject | – | not run: no GPU | – | – | – |" in scaling and "old" not in scaling
    assert "<!-- kills -->\nNot measured yet.\n<!-- end of kills -->\nbelow\n" in scaling
    assert "On a GPU: not measured." in (results / "speed.md").read_text()
    assert hosts.startswith("above\n") and hosts.endswith("below\n") and "old" not in hosts
    assert "| bert | ✓ | (1) |" in hosts and "1. no compiler." in hosts
    assert "| family | detach bit-equal | new thing |" in hosts
    assert "| bert | ✗ | – |" in hosts and "| llama (decoder) | – | ✓ |" in hosts
    assert "| cut off | 1,200 | 3 | 0 | 0 |" in hosts
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("above\n") and readme.endswith("below\n") and "old" not in readme
    assert "No ready adapter is recorded." in readme
    assert "0.7500 ± 0.0707" in (results / "runs.md").read_text()


def test_a_record_names_no_folder_of_the_machine(tmp_path):
    kept = json.dumps(record_of(a_run(tmp_path / "0", 0, 0.8)))
    assert "host-a" in kept and "private" not in kept and str(tmp_path) not in kept


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        record_of(tmp_path)


def test_an_ablation_is_a_table_of_differences(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    folder = a_run(tmp_path / "ablation" / "00", 0, 0.8).parent
    arguments = json.loads((folder / "00/run_arguments.json").read_text())
    arguments["data"]["splits"]["train"] = {"sentences": 3500, "sha256": "cd"}
    (folder / "00/run_arguments.json").write_text(json.dumps(arguments))
    with pytest.raises(ConfigError, match=r"ablation.json cannot be read"):
        ablation_of(folder)
    rows = [{"row": "as shipped", "f1": {"source": 0.8, "b": 0.7}}, {"row": "no x", "f1": {"source": 0.81, "b": 0.6}}]
    (folder / "ablation.json").write_text(json.dumps({"rows": rows, "space_hosts": ["a", "b"]}))
    benchmark.main(["record", str(folder), "--name", "parts"])
    text = rendered(read_records(tmp_path / "results"))
    assert "| no x | 0.8100 | +0.0100 | 0.6000 | -0.1000 |" in text
    assert "3,500 sentences of tweets (5 steps × 2), seed 0" in text
    assert "The shipped space is english 1 abc." in text and "The space hosts are a, b." in text


def test_a_line_of_the_papers_runs_is_replaced_by_the_same_run(tmp_path):
    results = tmp_path / "results"
    for name, score in (("b-iter1-x-s0", 0.5), ("a-iter1-x-s0", 0.6), ("b-iter1-x-s0", 0.7)):
        run = tmp_path / f"{score}" / name
        keep_paper_run(a_run(run, 0, score), "paper", results)
    lines = (results / "paper.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a-iter1-x-s0", "b-iter1-x-s0"]
    assert [json.loads(line)["results"]["eval_f1"] for line in lines] == [0.6, 0.7]
    for line in lines:
        assert line == json.dumps(json.loads(line), sort_keys=True, ensure_ascii=False)
    with pytest.raises(ConfigError, match="holds no finished run"):
        keep_paper_run(tmp_path / "none", "paper", results)
    assert (results / "paper.jsonl").read_text().splitlines() == lines


def test_the_best_lora_of_a_host_is_that_of_its_best_rate():
    def lora(kind: str, rate: float, seed: int, f1: float, config: str = "lora-iter1-x", host: str = "h") -> dict:
        settings = {"learning_rate": rate, "seed": seed}
        return {"kind": kind, "run_config": config, "host": host, "settings": settings, "results": {"eval_f1": f1}}

    records = [lora("paper", 0.1, 0, 0.5), lora("paper", 0.1, 1, 0.7), lora("paper_rate", 0.2, 0, 0.65)]
    records += [lora("paper", 0.1, 0, 0.9, "lora-r1-iter1-x"), lora("paper", 0.1, 0, 0.9, host="g")]
    named = dict(enumerate(records))
    assert best_lora(named, "x", "h") == 0.65 and best_lora(named, "y", "h") is None
