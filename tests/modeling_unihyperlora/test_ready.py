"""Adapters that the package brings along: found by name, and what lies there."""

import json
import shutil
from pathlib import Path

import pytest

from modeling_unihyperlora import AdapterFileError, CanonicalSpace, UniHyperLoraForTokenClassification, storage
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.modeling_unihyperlora import make_adapter
from modeling_unihyperlora.storage import READY, WEIGHTS_NAME, adapter_file, load_adapter, ready_adapters
from tests.modeling_unihyperlora.small_streams import TOKENIZER, bert, small_stream

RECORDS = json.loads((Path(__file__).parents[2] / "results" / "ready.json").read_text())["adapters"]
NAMES = sorted(RECORDS)


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A package with one ready adapter, "people"; its folder."""
    small_stream().save_pretrained(tmp_path / "ready" / "people")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(storage, "READY", tmp_path / "ready")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "ready" / "people"


def load(name: str, host):
    return UniHyperLoraForTokenClassification.from_pretrained(name, host=host, tokenizer=TOKENIZER)


def test_a_ready_adapter_is_loaded_by_its_name(ready):
    assert load("people", bert(24, 2)).labels == small_stream().labels
    other = small_stream(bert(), labels=["O", "X"], task="other")
    other.load_task("people")
    assert list(other.config.tasks) == ["other", "people"]


def test_a_folder_of_that_name_comes_first(ready):
    small_stream(labels=["O", "B-CITY"]).save_pretrained("people")
    assert load("people", bert()).labels == ["O", "B-CITY"]


@pytest.mark.parametrize("name", ["people2", "../ready/people2", "people/"])
def test_any_other_name_is_not(ready, name):
    with pytest.raises(AdapterFileError, match=r"is not a folder or one of people, and its"):
        load(name, bert())


def test_without_ready_adapters_none_are_named(ready):
    shutil.rmtree(ready)
    with pytest.raises(AdapterFileError, match="'people': it is not a folder, and its"):
        load("people", bert())


def test_those_that_are_recorded_are_there():
    assert "people-places-organisations" in NAMES
    assert ready_adapters() == NAMES
    assert all(
        sorted(path.name for path in (READY / name).iterdir()) == ["README.md", "config.json", WEIGHTS_NAME]
        for name in NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole_and_in_the_space_of_the_package(name):
    """So the package's other adapters share its line-up."""
    config = read_config(adapter_file(name, "config.json", None, {}))
    weights = adapter_file(name, WEIGHTS_NAME, None, {})
    assert weights.stat().st_size < 1_000_000
    assert list(config.tasks) == [name] == [config.active_task] and config.tasks[name]["trained"]
    assert config.base_model_name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    adapter = make_adapter(config)
    load_adapter(adapter, weights)
    assert adapter.space.digest == CanonicalSpace.default().digest


@pytest.mark.parametrize("name", NAMES)
def test_its_card_has_the_scores_that_were_recorded(name):
    record = RECORDS[name]
    text = (READY / name / "README.md").read_text()
    for host, scores in record["f1"].items():
        assert f"| {host} | " + " | ".join(f"{score:.3f}" for score in scores.values()) + " |" in text
    assert f"{(READY / name / WEIGHTS_NAME).stat().st_size:,} bytes" in text
