"""--do_search from end to end on a tiny host: trials, budget, failures, kills, and resuming."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml

from modeling_unihyperlora import CanonicalSpace, ConfigError, UniHyperLoraError
from trainers import search as searching
from trainers.entry import main
from trainers.tasks import NER

REPOSITORY = Path(__file__).parents[2]
ROWS = [
    ([person, "lives", "in", place], ["B-PER", "O", "O", "B-LOC"])
    for person in ("anna", "ben", "carla")
    for place in ("paris", "rome")
]
RATES = {"learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1e-1}}


@pytest.fixture
def command(tiny_host, tmp_path, write_jsonl):
    """command({…search space…}, "--n_trials", 3, metric=…) → the command line; keywords become keys of the block."""
    data = write_jsonl("data.jsonl", ROWS)

    def make(space: dict | None, *flags, output: str = "out", pathway: str = "inject", **block) -> list[str]:
        path = tmp_path / "run.yaml"
        content = {
            "run_id": "x",
            "method": "unihyperlora",
            "adapter": {"pathway": pathway},
            "optuna": block | ({"search_space": space} if space else {}),
        }
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        fixed = [
            "--do_search",
            "--run_config",
            path,
            "--model_name_or_path",
            tiny_host,
            "--output_dir",
            tmp_path / output,
        ]
        fixed += ["--train_file", data, "--validation_file", data, "--use_cpu", "--disable_tqdm", "true"]
        fixed += ["--max_steps", 2, "--max_flops_overhead_pct", 1000]
        return list(map(str, [*fixed, *flags]))

    return make


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'search.db'}")


def test_it_goes_on_to_the_total_and_trains_the_best(command, tmp_path):
    folder = tmp_path / "out"
    space = RATES | {
        "router_top_k": {"type": "int", "low": 1, "high": 3},
        "batch_size": {"type": "categorical", "choices": [2, 3]},
    }
    main(NER, command(space, "--n_trials", 2))
    first = [trial.params for trial in study_of(folder).trials]
    results = main(NER, command(space, "--n_trials", 3))
    trials = study_of(folder).trials
    assert len(trials) == 3 and [trial.params for trial in trials[:2]] == first
    assert len({json.dumps(trial.params) for trial in trials}) == 3  # no draw twice
    best = max(trials, key=lambda trial: trial.value)
    assert results["eval_f1"] == best.value
    said = json.loads((folder / "run_arguments.json").read_text())
    assert said["learning_rate"] == best.params["learning_rate"]
    assert said["router_top_k"] == best.params["router_top_k"]
    assert said["per_device_train_batch_size"] == best.params["batch_size"]
    assert (folder / "model.safetensors").is_file() and not list((folder / "trials").iterdir())
    report = json.loads((folder / "search.json").read_text())
    assert report["best"] == best.number and [trial["state"] for trial in report["trials"]] == ["complete"] * 3
    page = (folder / "search.html").read_text()
    assert "Optimization History" in page and "plotly" in page
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(NER, command(space, "--n_trials", 3)) == results  # nothing is left to do
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_resumed_search_draws_as_an_uninterrupted_one(command, tmp_path, monkeypatch):
    scores = iter([{"eval_f1": x, "eval_loss": 1.0} for x in (0.1, 0.4, 0.2, 0.5)] * 2)
    monkeypatch.setattr(searching, "run", lambda task, typed, callbacks=(): next(scores))
    monkeypatch.setattr(searching, "RANDOM_TRIALS", 1)
    for total, output in ((4, "whole"), (2, "parts"), (4, "parts")):
        plan = searching.plan_of(NER, command(RATES, "--n_trials", total, output=output))
        study = searching._open(plan)
        while (begun := searching._next_trial(plan, study)) is not None:
            searching._run_trial(plan, study, *begun[:2])
            begun[2].release()
    whole, parts = (study_of(tmp_path / name).trials for name in ("whole", "parts"))
    assert [trial.params for trial in whole] == [trial.params for trial in parts]
    assert len(whole) == 4


def test_over_budget_is_infeasible_and_not_trained(command, tmp_path):
    space = {"atoms": {"type": "categorical", "choices": [16, 4000]}}
    results = main(NER, command(space, "--n_trials", 3, "--seed", 1))
    trials = study_of(tmp_path / "out").trials
    over = [trial for trial in trials if trial.params["atoms"] == 4000]
    assert 0 < len(over) < 3
    assert all(trial.state.name == "PRUNED" and trial.constraints["bytes"] > 0 for trial in over)
    assert results["budget_ok"] is not None and results["adapter_bytes"] < 1_000_000
    assert all(max(trial.constraints.values()) <= 0 for trial in trials if trial not in over)


def test_nothing_within_the_budget(command, tmp_path):
    with pytest.raises(ConfigError, match="None of the 2 trials has a score .* The last trial: Over budget"):
        main(NER, command({"atoms": {"type": "int", "low": 3000, "high": 4000}}, "--n_trials", 2))


def test_failed_trials_are_recorded_and_survived(command, tmp_path, monkeypatch):
    ends = iter([MemoryError("no memory"), None, RuntimeError("CUDA out of memory"), {"eval_loss": None}, None])

    def run(task, typed, callbacks=()):
        end = next(ends)
        if isinstance(end, Exception):
            raise end
        return {"eval_f1": 0.5, "eval_loss": 1.0} | (end or {})

    monkeypatch.setattr(searching, "run", run)
    assert main(NER, command(RATES, "--n_trials", 4))["eval_f1"] == 0.5
    trials = study_of(tmp_path / "out").trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "FAIL", "FAIL"]
    errors = [trial.user_attrs.get("error") for trial in trials]
    assert errors[:3] == ["MemoryError: no memory", None, "RuntimeError: CUDA out of memory"]
    assert "eval_loss None: not a number" in errors[3]
    report = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [trial.get("error") for trial in report["trials"]] == errors


def test_a_loss_that_is_no_number_ends_the_trial(command, tmp_path, monkeypatch):
    space = {"learning_rate": {"type": "categorical", "choices": [1e-2, 1e30]}}
    flags = ["--n_trials", 3, "--max_steps", 4, "--logging_steps", 1, "--logging_nan_inf_filter", "false", "--seed", 3]
    results = main(NER, command(space, *flags, "--max_grad_norm", 1e30))
    trials = study_of(tmp_path / "out").trials
    assert {trial.state.name for trial in trials if trial.params["learning_rate"] == 1e-2} == {"COMPLETE"}
    failed = [trial for trial in trials if trial.params["learning_rate"] == 1e30]
    assert failed and all(
        trial.state.name == "FAIL" and "not a number" in trial.user_attrs["error"] for trial in failed
    )
    assert results["eval_loss"] is not None


def test_a_trial_below_the_median_is_pruned(command, tmp_path, monkeypatch):
    def run(task, typed, callbacks=()):
        rate = float(typed[typed.index("--learning_rate") + 1])
        for step in (8, 16, 24):
            state = SimpleNamespace(global_step=step, max_steps=24)
            for callback in callbacks:
                callback.on_evaluate(None, state, None, metrics={"eval_f1": rate, "eval_loss": 1.0})
        return {"eval_f1": rate, "eval_loss": 1.0}

    monkeypatch.setattr(searching, "run", run)
    monkeypatch.setattr(searching, "RANDOM_TRIALS", 2)
    main(NER, command({"learning_rate": {"type": "categorical", "choices": [0.1, 0.2, 0.3]}}, "--n_trials", 8))
    trials = study_of(tmp_path / "out").trials
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert pruned and all(trial.params["learning_rate"] < 0.3 for trial in pruned)
    assert all(list(trial.intermediate_values) == [8] for trial in pruned)


def test_score_and_bytes(command, tmp_path, monkeypatch):
    def run(task, typed, callbacks=()):
        atoms = int(typed[typed.index("--atoms") + 1])
        return {"eval_f1": atoms / 100, "eval_loss": 1.0, "adapter_bytes": atoms * 1000}

    monkeypatch.setattr(searching, "run", run)
    space = {"atoms": {"type": "int", "low": 8, "high": 64}}
    results = main(NER, command(space, "--n_trials", 4, objectives=["score", "bytes"]))
    study = study_of(tmp_path / "out")
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert all(trial.values == [trial.params["atoms"] / 100, trial.params["atoms"] * 1000] for trial in study.trials)
    assert len(json.loads((tmp_path / "out" / "search.json").read_text())["front"]) == 4  # more score, more bytes
    assert results["eval_f1"] == max(trial.values[0] for trial in study.trials)
    assert "Pareto" in (tmp_path / "out" / "search.html").read_text()


def test_a_killed_trial_is_tried_again_once(command, tmp_path):
    plan = searching.plan_of(NER, command(RATES, "--n_trials", 1))
    study = searching._open(plan)
    lost, values, lock = searching._next_trial(plan, study)
    lock.release()  # as the system does when a process dies
    again, second, lock = searching._next_trial(plan, study)
    assert second == values and again.number == 1
    lock.release()
    assert searching._next_trial(plan, study) is None  # it was tried twice
    states = [(trial.state.name, trial.user_attrs.get("error")) for trial in study_of(tmp_path / "out").trials]
    assert states == [("FAIL", None), ("FAIL", "its process was killed, twice")]


@pytest.fixture
def small_space(tiny_host, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "anchors.txt").write_text("".join(" ".join(words) + "\n" for words, _ in ROWS) * 12)
    CanonicalSpace.make([str(tiny_host)], tmp_path / "anchors.txt", dim=8).save(tmp_path / "space.safetensors")
    return tmp_path / "space.safetensors"


def test_a_stream_and_then_a_task_that_is_new_to_it(command, tmp_path, small_space):
    space = RATES | {
        "reader": {"type": "categorical", "choices": ["small", "medium"]},
        "reader_bits": {"type": "categorical", "choices": [4, 8]},
        "fidelity": {"type": "uniform", "low": 0.5, "high": 1.0},
        "reader_learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1e-1},
    }
    flags = ["--n_trials", 2, "--max_flops_overhead_pct", "1e6"]
    own = {"pathway": "stream", "objectives": ["score", "bytes"]}
    results = main(NER, command(space, *flags, "--space", small_space, **own))
    best = json.loads((tmp_path / "out" / "search.json").read_text())["best_params"]
    said = json.loads((tmp_path / "out" / "run_arguments.json").read_text())
    assert {name: said[name] for name in space} == best
    shape = json.loads((tmp_path / "out" / "config.json").read_text())["tasks"]["ner"]["reader"]
    assert (shape["bits"], shape["width"]) == (best["reader_bits"], {"small": 64, "medium": 96}[best["reader"]])
    assert results["reader_bytes"] > 0
    added = [*flags, "--adapter", tmp_path / "out", "--task_name", "more"]
    del space["reader_bits"]
    main(NER, command(space, *added, output="second", **own))
    tasks = json.loads((tmp_path / "second" / "config.json").read_text())["tasks"]
    assert tasks["ner"]["reader"] == shape and set(tasks) == {"ner", "more"}
    with pytest.raises(ConfigError, match="'optuna.search_space.reader': --adapter fixes it, unless --task_"):
        main(NER, command(space, *flags, "--adapter", tmp_path / "out", output="third", **own))


@pytest.mark.slow
def test_two_processes_share_the_trials(command, tmp_path):
    typed = [sys.executable, "scripts/run_ner.py", *command(RATES, "--n_trials", 4)]
    both = [subprocess.Popen(typed, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    trials = study_of(tmp_path / "out").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    assert len({trial.params["learning_rate"] for trial in trials}) == 4


# ---- what is searched ----


def test_the_papers_space_by_default(command):
    plan = searching.plan_of(NER, command(None))
    assert plan.n_trials == 25
    assert {knob.flag: tuple(knob.some_values()) for knob in plan.knobs} == {
        "learning_rate": (5e-5, 5e-4),
        "per_device_train_batch_size": (32, 64, 128),
        "lambda_f": (0.01, 0.1),
        "lambda_q": (1e-6, 1e-4),
        "router_top_k": (1, 3),
    }
    plan = searching.plan_of(NER, command(None, "--lambda_q", 0))
    assert "lambda_q" not in [knob.flag for knob in plan.knobs]  # what is typed wins


def test_a_stream_has_a_space_of_its_own_by_default(command):
    def varied(*flags) -> set[str]:
        plan = searching.plan_of(NER, command(None, *flags, pathway="stream"))
        return {knob.flag for knob in plan.knobs}

    assert varied() == {"learning_rate", "per_device_train_batch_size", "fidelity", "reader"}
    assert varied("--adapter", "x", "--train_scope", "delta") == {
        "learning_rate",
        "per_device_train_batch_size",
        "lambda_q",
    }


def test_a_stream_does_not_search_what_it_has_not(command, tmp_path):
    for name in ("atoms", "router_top_k", "lambda_F", "router_learning_rate"):
        knob = (
            {"type": "categorical", "choices": [1, 2]} if name in ("atoms", "router_top_k") else RATES["learning_rate"]
        )
        with pytest.raises(ConfigError, match=f"'optuna.search_space.{name}': it is for --pathway inject"):
            main(NER, command({name: knob}, pathway="stream"))
    with pytest.raises(ConfigError, match="fidelity=1.5 is not allowed"):
        main(NER, command({"fidelity": {"type": "uniform", "low": 0.5, "high": 1.5}}, pathway="stream"))
    with pytest.raises(ConfigError, match="reader='huge' is not allowed"):
        main(NER, command({"reader": {"type": "categorical", "choices": ["small", "huge"]}}, pathway="stream"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("space", "flags", "expected"),
    [
        ({"router_lr": {"type": "uniform", "low": 0, "high": 1}}, [], "does not read it. .*'router_top_k'"),
        (
            {"reader": {"type": "categorical", "choices": ["small"]}},
            [],
            "this run ignores .*: it is for --pathway stream",
        ),
        ({"router_top_k": {"type": "int", "low": 1, "high": 4}}, [], "router_top_k=4"),
        ({"atoms": {"type": "uniform", "low": 8, "high": 9.5}}, [], "invalid int value"),
        (RATES, ["--learning_rate", 1], "nothing is left to search"),
        (RATES, ["--n_trials", 0], "n_trials=0 is not allowed"),
        (RATES, ["--resume_from_checkpoint", "true"], "resumes by itself"),
        ({"lambda_F": {"type": "uniform", "low": 0, "high": 1}}, ["--method", "full"], "--method full"),
    ],
)
def test_refusals(command, tmp_path, capsys, space, flags, expected):
    with pytest.raises((UniHyperLoraError, SystemExit)) as error:
        main(NER, command(space, *flags))

    assert re.search(expected, str(error.value) + capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_another_search_in_the_folder(command, tmp_path):
    searching._open(searching.plan_of(NER, command(RATES)))
    searching._open(searching.plan_of(NER, command(RATES, "--n_trials", 2)))
    other = {"learning_rate": {"type": "uniform", "low": 0.1, "high": 1}}
    with pytest.raises(ConfigError, match="holds another search; it differs in max_steps, search_space"):
        main(NER, command(other, "--max_steps", 3))


def test_a_metric_that_no_run_reports(command):
    with pytest.raises(UniHyperLoraError, match="optuna.metric is eval_bleu, .* it reports eval_accuracy"):
        main(NER, command(RATES, "--n_trials", 3, metric="eval_bleu"))
