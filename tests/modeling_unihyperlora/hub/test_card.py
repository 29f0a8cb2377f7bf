"""The generated model card: its text, its metadata, and that it invents nothing."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.publish.card import card_text, is_hub_id, write_card
from modeling_unihyperlora.publish.hub import stage

RESULTS = {
    "eval_f1": 0.8955,
    "eval_accuracy": 0.97,
    "bytes_of_head": 2340,
    "flops_overhead_pct": 4.5,
    "zero_shot_f1": None,
}
RUN = {"seed": 3, "max_steps": 40, "dataset_name": "alice/news", "train_scope": "task"}
RUN["data"] = {"name": "alice/news", "splits": {"train": {"sentences": 14041, "sha256": "ab" * 32}}}


@pytest.fixture
def folder(adapter_folder, tmp_path):
    """An adapter's folder with the results of a run, ready for the Hub."""
    run = tmp_path / "run"
    shutil.copytree(adapter_folder(), run)
    (run / "all_results.json").write_text(json.dumps(RESULTS))
    (run / "run_arguments.json").write_text(json.dumps(RUN))
    (tmp_path / "staged").mkdir()
    stage(run, tmp_path / "staged", "alice/ner", "alice/source")
    return tmp_path / "staged"


@pytest.fixture
def record(folder, tmp_path):
    """record(**changes) → the path of a transfer record of that adapter."""

    def write(**changes):
        sources = json.loads((folder / "config.json").read_text())["source_hosts"]
        cell = {"mean": 0.857, "sd": 0.004}
        target = {"num_layers": 12, "hidden_size": 768, "zero_shot_f1": cell, "probe_f1": {"mean": 0.5, "sd": None}}
        columns = [{"key": "zero_shot", "label": "zero-shot"}, {"key": "probe", "label": "linear probe"}]
        columns.append({"key": "lora_r8", "label": "LoRA"})
        content = {"kind": "transfer", "source_hosts": sources, "targets": {"wide": target}, "columns": columns}
        path = tmp_path / "transfer.json"
        path.write_text(json.dumps(content | {"seeds": [0, 1], "data": {"name": "news"}} | changes))
        return path

    return write


def test_the_metadata_is_what_the_hub_reads(folder):
    data = ModelCard((folder / "README.md").read_text()).data
    assert data.base_model == ["alice/source"] and data.library_name == "transformers"
    assert data.license == "apache-2.0" and data.pipeline_tag == "token-classification"
    assert data.datasets == ["alice/news"] and {"unihyperlora", "custom_code"} <= set(data.tags)
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    assert scores == {"f1": 0.8955, "accuracy": 0.97}
    assert {result.task_type for result in data.eval_results} == {"token-classification"}


def test_it_says_what_is_recorded(folder):
    card = (folder / "README.md").read_text()
    size = (folder / "model.safetensors").stat().st_size
    for text in (f"{size:,} bytes", "| eval_f1 | 0.8955 |", "14,041 sentences", "seed 3", "`B-PER`", "4.5 %", "R²"):
        assert text in card
    assert "zero_shot_f1" not in card and "## Transfer" not in card  # not measured


def test_the_transfer_matrix(folder, record):
    card = card_text(folder, "alice/ner", transfer=record())
    assert "| wide | 12 × 768 | 0.857 ± 0.004 | 0.500 | – |" in card


def test_a_record_of_another_adapter_is_refused(folder, record):
    with pytest.raises(ConfigError, match="trained on other hosts"):
        card_text(folder, transfer=record(source_hosts=[{"name": "x", "fingerprint": "0"}]))
    with pytest.raises(ConfigError, match="not a record of scripts/transfer.py"):
        card_text(folder, transfer=record(kind="ablation"))


def test_licences(folder, tiny_host, tmp_path, adapter_folder):
    assert card_text(folder).count("not stated at its source") == 2
    card = card_text(folder, host_license="mit", data_license="cc-by-4.0")
    assert "licence of the host: mit" in card and "licence of the data: cc-by-4.0" in card
    host_card = tiny_host / "README.md"
    host_card.write_text("---\nlicense: bsd-3-clause\n---\n")
    try:
        assert "licence of the host: bsd-3-clause" in card_text(adapter_folder())
    finally:
        host_card.unlink()


def test_the_same_folder_gives_the_same_card(folder):
    before = (folder / "README.md").read_text()
    write_card(folder, "alice/ner")
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("name", "answer"),
    [("bert-base-uncased", True), ("a/b", True), ("/a/b", False), ("./b", False), ("a/b/c", False), (None, False)],
)
def test_names_of_the_hub(name, answer):
    assert is_hub_id(name) == answer
