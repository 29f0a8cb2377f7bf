"""Training with pushes, through the script and through the Trainer's methods."""

import json

import pytest

from modeling_unihyperlora import ConfigError, HubError
from modeling_unihyperlora.publish.hub import files_of
from scripts import run_ner
from trainers import UniHyperLoraTrainingArguments

FILES = files_of("inject")
ROWS = [(["anna", "lives", "in", place], ["B-PER", "O", "O", "B-LOC"]) for place in ("paris", "rome", "oslo", "lima")]


@pytest.fixture
def flags(write_jsonl, tmp_path):
    data = str(write_jsonl("data.jsonl", ROWS * 4))
    flags = ["--model_name_or_path", "alice/source", "--train_file", data, "--validation_file", data, "--do_train"]
    flags += [
        "--do_eval",
        "--max_steps",
        "2",
        "--use_cpu",
        "--pathway",
        "inject",
        "--disable_tqdm",
        "true",
        "--max_flops_overhead_pct",
        "100",
    ]
    return [*flags, "--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", "alice/trained"]


def files(hub, repo="alice/trained"):
    entries = hub.store.files(hub.store.repos[repo], "main")
    return {path: hub.store.content(entry) for path, entry in entries.items()}


def test_the_script_pushes_the_adapter_with_its_scores(hub, flags, tmp_path):
    results = run_ner.main([*flags, "--save_steps", "1", "--hub_private_repo", "true"])
    pushed = files(hub)
    assert set(pushed) == {*FILES, ".gitattributes"} and hub.store.repos["alice/trained"].private
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").is_file()  # of which nothing is pushed
    card = pushed["README.md"].decode()
    assert f"| eval_f1 | {results['eval_f1']:.4f} |" in card and "base_model:\n- alice/source" in card
    assert pushed["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert json.loads(pushed["config.json"])["base_model_name_or_path"] == "alice/source"
    assert len(hub.store.repos["alice/trained"].commits) >= 4  # made, two steps, the end


@pytest.mark.slow
def test_a_hub_that_fails_meanwhile_does_not_end_the_training(hub, flags, monkeypatch, caplog):
    monkeypatch.setattr("modeling_unihyperlora.publish.hub.PATIENCE", 0.5)
    fault = hub.fault("POST .*/commit/", "status", status=500)
    run_ner.main([*flags, "--save_steps", "1"])
    assert fault.happened == 1 and "Training continues" in caplog.text
    assert set(FILES) <= set(files(hub))


def test_who_may_not_write_is_told_before_training(hub, flags, tmp_path):
    with pytest.raises(HubError, match="may not write"):
        run_ner.main([*flags, "--hub_model_id", "bob/trained"])
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_training_state_is_not_for_the_hub(tmp_path, strategy):
    with pytest.raises(ConfigError, match="training state"):
        UniHyperLoraTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy, use_cpu=True)
