"""Damaged adapters are refused or score the same, and the fuzzer would report others."""

import json
import random

import pytest

from modeling_unihyperlora import storage
from scripts.research import fuzz_adapter


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))


def total(report: dict, outcome: str) -> int:
    return sum(counts.get(outcome, 0) for counts in report["outcomes"].values())


def test_none_of_two_hundred_slips_through():
    report = fuzz_adapter.fuzz(200, seed=1)
    assert report["failures"] == [] and total(report, "failed") == 0
    assert total(report, "refused") > 140 and total(report, "loaded, equal logits") > 0
    assert all(sum(counts.values()) == 20 for counts in report["outcomes"].values())


@pytest.mark.slow
def test_none_of_ten_thousand_slips_through(tmp_path):
    fuzz_adapter.main(["--files", "10000", "--seed", "2", "--output", str(tmp_path / "fuzz.json")])
    assert json.loads((tmp_path / "fuzz.json").read_text())["failures"] == []


def test_other_weights_without_a_word_are_seen(monkeypatch):
    """If the digest detected nothing, flipped bits would load and be reported."""
    monkeypatch.setattr(storage, "content_digest", lambda tensors, metadata: "same")
    report = fuzz_adapter.fuzz(120, seed=1)
    assert any(": loaded with other logits" in failure for failure in report["failures"])


def test_another_exception_is_seen(monkeypatch):
    monkeypatch.setattr(storage, "read_checked", lambda path: [][0])
    with pytest.raises(IndexError):
        fuzz_adapter.Sample("inject")
    monkeypatch.undo()
    sample = fuzz_adapter.Sample("inject")
    monkeypatch.setattr(fuzz_adapter, "Sample", lambda pathway: sample)
    score = sample.score
    monkeypatch.setattr(sample, "score", lambda files: score(files) if files == sample.files else [][0])
    report = fuzz_adapter.fuzz(20, seed=1)
    assert len(report["failures"]) == 20 and "IndexError" in report["failures"][0]


@pytest.mark.parametrize("name", fuzz_adapter.DAMAGES)
def test_every_damage_changes_something(name):
    file, damage = fuzz_adapter.DAMAGES[name]
    sample = fuzz_adapter.Sample("inject")
    changed = {damage(sample.files[file], random.Random(seed)) for seed in range(20)}
    assert len(changed - {sample.files[file]}) >= 8
