"""Run configurations: the meaning of the shipped files, and that no key is ignored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from modeling_unihyperlora.errors import ConfigError
from trainers import run_config
from trainers.arguments import NerArguments, parse
from trainers.run_config import read_run_config

RUNS = Path(__file__).parents[2] / "hub_configs" / "runs"
PROPOSED = RUNS / "proposed-iter1-CoNLL-2003.yaml"
COMPARATIVE = RUNS / "comparative-1-iter1-CoNLL-2003.yaml"


@pytest.fixture
def changed(tmp_path):
    """changed({"adapter.atoms": 64}) → the proposed run with these keys set (or dropped, where None)."""

    def write(changes: dict, base: Path = PROPOSED) -> Path:
        content = yaml.safe_load(base.read_text(encoding="utf-8"))
        for name, value in changes.items():
            *blocks, last = name.split(".")
            target = content
            for block in blocks:
                target = target[block]
            if value is None:
                del target[last]
            else:
                target[last] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


# ---- the shipped files ----


def test_the_proposed_run():
    run = read_run_config(PROPOSED)
    on_cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}
    assert run.arguments == on_cpu | {
        "output_dir": "runs/proposed-iter1-CoNLL-2003",
        "method": "unihyperlora",
        "model_name_or_path": "distilbert-base-uncased",
        "hidden_size": 768,
        "num_layers": 6,
        "hub_model_id": "unihyperlora-conll2003",
        "pathway": "inject",
        "atoms": 128,
        "anchor_dim": 256,
        "router_top_k": 2,
        "lambda_f": 0.05,
        "lambda_q": 1e-5,
        "train_scope": "delta",
        "task_name": "conll2003",
        "dataset_name": "eriktks/conll2003",
        "train_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "max_seq_length": 128,
        "optim": "adamw_torch",
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 32,
        "max_steps": 500,
        "lr_scheduler_type": "linear",
        "warmup_steps": 50,
        "seed": 42,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "max_adapter_bytes": 1_000_000,
        "max_flops_overhead_pct": 10,
        "bf16": True,
    }
    assert run.search["n_trials"] == 25
    assert run.search["search_space"]["lambda_Q"] == {"type": "loguniform", "low": 1e-6, "high": 1e-4}


def test_the_comparative_run():
    run = read_run_config(COMPARATIVE)
    adapter = {"lora_r": 8, "lora_alpha": 16, "share_across_layers": False}
    adapter["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "ffn_down", "ffn_up"]
    expected = {"method": "sat_lora", "learning_rate": 3e-4, "max_steps": 3000, "warmup_steps": 300}
    expected |= adapter | {"weight_decay": 0.01, "max_adapter_bytes": 32_000_000}
    assert {name: run.arguments[name] for name in expected} == expected
    assert run.search["search_space"]["batch_size"] == {"type": "categorical", "choices": [16, 32, 64]}


WHOLE = sorted(path.stem for path in RUNS.glob("*.yaml") if path.stem != "common")
METHODS, DATASETS = (sorted(path.stem for path in (RUNS / kind).glob("*.yaml")) for kind in ("method", "dataset"))
COMPOSED = [f"{method}-iter1-{dataset}" for method in METHODS for dataset in DATASETS]


@pytest.mark.parametrize("name", WHOLE + COMPOSED)
def test_every_shipped_run(name):
    run = read_run_config(RUNS / name)
    assert run == read_run_config(name)
    assert run.run_id == name
    parse(["--run_config", name], NerArguments)  # every argument is one of the script's


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_says_how_it_is_run(name):
    assert f"--run_config hub_configs/runs/{name}.yaml" in (RUNS / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WHOLE + COMPOSED)
def test_hydra_composes_the_same(name):
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    method, _, dataset = name.partition("-iter1-")
    parts = [f"+dataset={dataset}", f"+method={method}"] if name in COMPOSED else []
    with hydra.initialize_config_dir(str(RUNS), version_base=None):
        composed = hydra.compose("common" if parts else name, overrides=[*parts, "training.batch_size=7"])
    content = OmegaConf.to_container(composed, resolve=True)
    assert content["training"].pop("batch_size") == 7
    own = run_config._content(RUNS / name)
    del own["training"]["batch_size"]
    assert content == own


def test_a_composed_run():
    """A composed configuration has all parts; the method overrides the common part."""
    arguments = read_run_config("unihyperlora-source-iter1-amazon").arguments
    said = {"task_name": "amazon", "train_split": "train[:20000]", "hub_model_id": "unihyperlora-amazon"}
    said |= {
        "model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
        "warmup_steps": 300,
        "per_device_train_batch_size": 32,
    }
    assert {name: arguments[name] for name in said} == said


def test_a_method_that_begins_with_another_one():
    """Own keys win over those of the method named under ``defaults``; other keys are taken over."""
    names = ("unihyperlora-task-small-iter1-sst2", "unihyperlora-cost-small-iter1-sst2")
    small, cost = (read_run_config(name).arguments for name in names)
    assert (small["reader"], small["copy_share"], small["max_steps"]) == ("small", 0, 500)
    assert (cost["reader"], cost["copy_share"], cost["max_steps"], cost["bf16"]) == ("small", 0, 1500, True)


@pytest.mark.parametrize("defaults", ["probe", ["_self_", "probe"], [], {"probe": 1}, 3])
def test_defaults_of_another_form(defaults, tmp_path):
    shutil.copytree(RUNS, tmp_path / "runs")
    (tmp_path / "runs" / "method" / "own.yaml").write_text(f"defaults: {json.dumps(defaults)}\nmethod: probe\n")
    with pytest.raises(ConfigError, match="'defaults' must be a list of files of this folder with _self_ at its end"):
        read_run_config(tmp_path / "runs" / "own-iter1-sst2")


def test_defaults_that_lead_back(tmp_path):
    shutil.copytree(RUNS, tmp_path / "runs")
    for name, other in (("own", "another"), ("another", "own")):
        (tmp_path / "runs" / "method" / f"{name}.yaml").write_text(f"defaults: [{other}, _self_]\nmethod: probe\n")
    with pytest.raises(ConfigError, match="own.yaml: its 'defaults' lead back to itself"):
        read_run_config(tmp_path / "runs" / "own-iter1-sst2")


@pytest.mark.parametrize(
    "name,expected",
    [
        ("lora-iter1-conl2003", "no dataset 'conl2003'.*amazon, boolq, conll2003, sst2"),
        ("lorra-iter1-sst2", "no method 'lorra'.*full, lora, lora-r1"),
        ("nothing", "nothing cannot be read"),
    ],
)
def test_a_name_that_is_none(name, expected):
    with pytest.raises(ConfigError, match=expected):
        read_run_config(name)


# ---- with the command line ----


def test_flags_that_are_typed_win():
    model_args, data_args, training_args = parse(
        ["--run_config", str(PROPOSED), "--learning_rate", "1e-3", "--bf16", "false", "--train_scope=task"]
        + ["--output_dir", "elsewhere", "--num_layers", "12", "--train_file", "a.jsonl"],
        NerArguments,
    )
    assert (training_args.learning_rate, training_args.bf16, training_args.train_scope) == (1e-3, False, "task")
    assert (training_args.output_dir, model_args.num_layers) == ("elsewhere", 12)
    assert (data_args.train_file, data_args.dataset_name) == ("a.jsonl", None)
    assert (training_args.max_steps, training_args.lambda_q, model_args.atoms) == (500, 1e-5, 128)


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(ConfigError, match="--learn_rate. The nearest flag is --learning_rate"):
        parse(["--learn_rate", "1"], NerArguments)


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter.atom": 3}, "unknown key 'adapter.atom'. The nearest key is 'atoms'"),
        ({"dataset.splits.dev": "x"}, "unknown key 'dataset.splits.dev'"),
        ({"trainings": {}}, "unknown key 'trainings'. The nearest key is 'training'"),
        ({"adapter.lora_rank": 8}, "unknown key 'adapter.lora_rank'"),
        ({"adapter.atoms": "128"}, "'adapter.atoms' must be of type int, not '128'"),
        ({"adapter.atoms": True}, "must be of type int, not True"),
        ({"training.learning_rate": "fast"}, "'training.learning_rate' must be of type float"),
        ({"training.max_steps": 1.5}, "'training.max_steps' must be of type int"),
        ({"training": [1]}, "'training' must be a block of keys"),
        ({"adapter.quant_bits": 8}, "'adapter.quant_bits' is 8; allowed: 4"),
        ({"adapter.bias_bits": 2}, "'adapter.bias_bits' is 2; allowed: 4"),
        ({"training.optimizer": "sgd"}, "'training.optimizer' is 'sgd'; allowed: adamw"),
        ({"evaluation.metric": "bleu"}, "allowed: seqeval"),
        ({"hardware.precision": "int4"}, "allowed: bf16, fp16, fp32"),
        ({"method": "magic"}, "'method' is 'magic'; allowed: unihyperlora"),
        ({"method": ["sat_lora"]}, "'method' must be of type str"),
        ({"method": None}, "the key 'method' is missing"),
        ({"run_id": None}, "the key 'run_id' is missing"),
        ({"adapter.freeze_base_adapter": False}, "Both are true"),
        ({"training.update_param_groups": ["adapter"]}, "update_param_groups is"),
        ({"optuna.search_space.atom": {}}, "'optuna.search_space.atom' is unknown: .*'atoms'"),
        ({"optuna.search_space.atoms": 3}, "needs a type"),
        ({"optuna.search_space.atoms": {"type": "int", "low": 8, "high": 4}}, "no usable range"),
        ({"optuna.search_space.atoms": {"type": "uniform", "low": 1, "high": 4, "stp": 1}}, "unknown key 'stp'"),
        ({"optuna.search_space.lambda_F": {"type": "loguniform", "low": 0, "high": 4}}, "no usable range"),
        ({"optuna.search_space.atoms": {"type": "categorical", "choices": []}}, "no usable range"),
    ],
)
def test_bad_content_is_named(changed, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        read_run_config(changed(changes))


def test_training_a_task(changed):
    source = {"adapter.freeze_base_adapter": False, "adapter.train_bias_delta_only": False}
    path = changed(source | {"training.update_param_groups": ["adapter"]})
    assert read_run_config(path).arguments["train_scope"] == "task"


def test_the_batch_is_that_of_all_processes(changed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_run_config(PROPOSED).arguments["per_device_train_batch_size"] == 8
    with pytest.raises(ConfigError, match="batch_size=30 cannot be split evenly over 4"):
        read_run_config(changed({"training.batch_size": 30}))


def test_a_gpu_that_is_not_there(changed, monkeypatch):
    monkeypatch.setattr(run_config.torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="hardware.accelerator is gpu and there is no GPU here"):
        read_run_config(changed({"hardware.accelerator": "gpu"}))


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run_id: 1e\nmethod: unihyperlora\ntraining: {learning_rate: 2e-4, weight_decay: 1E+0}\n")
    arguments = read_run_config(path).arguments
    assert (arguments["learning_rate"], arguments["weight_decay"]) == (2e-4, 1.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "is not YAML"),
        (b"run_id: a\nrun_id: b\n", "the key 'run_id' is given twice"),
        (b"- a\n", "must be a block of keys"),
        (b"", "must be a block of keys"),
        (b"run_id: \xe9\n", "not UTF-8"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_a_bad_file(tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        read_run_config(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run_config(tmp_path / "no.yaml")
