"""Hosts without their upper blocks: pruning, scoring, and errors."""

import json

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

from modeling_unihyperlora import CanonicalSpace, ConfigError
from modeling_unihyperlora.hosts import load_host
from scripts.research import benchmark, pruned_hosts, runner
from tests.conftest import WORDS, tiny_tokenizer
from trainers.running import run
from trainers.tasks import NER

LABELS = ["O", "B-PER", "B-LOC"]


@pytest.fixture
def host(tmp_path) -> str:
    shape = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 100}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer()), **shape)).save_pretrained(tmp_path / "host")
    tiny_tokenizer().save_pretrained(tmp_path / "host")
    return str(tmp_path / "host")


def test_the_first_blocks_compute_what_they_did(host, tmp_path):
    whole, pruned = load_host(host), load_host(str(pruned_hosts.prune(host, 2, tmp_path / "pruned")))
    assert pruned.config.num_hidden_layers == len(pruned.encoder.layer) == 2
    batch = tiny_tokenizer()(["anna lives in paris"], return_tensors="pt")
    with torch.no_grad():
        expected = whole(**batch, output_hidden_states=True).hidden_states[2]
        assert torch.equal(pruned(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("layers", [0, 5])
def test_more_or_fewer_blocks_than_there_are(layers, host, tmp_path):
    with pytest.raises(ConfigError, match=f"has 4 blocks; {layers} cannot be kept"):
        pruned_hosts.prune(host, layers, tmp_path / "pruned")


def test_shared_blocks_cannot_be_cut(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AlbertModel(AlbertConfig(vocab_size=20, embedding_size=16, **shape)).save_pretrained(tmp_path / "albert")
    with pytest.raises(ConfigError, match="'albert' cannot be pruned"):
        pruned_hosts.prune(str(tmp_path / "albert"), 1, tmp_path / "pruned")


@pytest.mark.slow
def test_a_curve_from_one_adapter(host, write_jsonl, tmp_path, monkeypatch):
    """Train for a step, score on 1, 2 and 4 blocks, record the curve; a second call repeats nothing."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    rows = [(["anna", "lives", "in", "paris", "."], ["B-PER", "O", "O", "B-LOC", "O"])] * 8
    data = str(write_jsonl("data.jsonl", rows))
    shape = f"--model_name_or_path {host} --train_file {data} --pathway stream --do_train --max_steps 2"
    rows = [" ".join(np.random.default_rng(n).choice(WORDS, 8)) for n in range(120)]
    (tmp_path / "anchors.txt").write_text("\n".join(rows))
    CanonicalSpace.make([host], tmp_path / "anchors.txt", dim=16).save(tmp_path / "space.safetensors")
    more = "--use_cpu --report_to none --reader small --max_flops_overhead_pct 100000"
    more += f" --space {tmp_path / 'space.safetensors'}"
    run(NER, [*shape.split(), *more.split(), "--output_dir", str(tmp_path / "adapter")])
    command = ["--adapter", str(tmp_path / "adapter"), "--hosts", host, "--layers", "2 1", "--validation_file", data]
    command += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"]
    curve = pruned_hosts.main(command)
    assert [(row["host"], row["layers"], row["of"]) for row in curve["rows"]] == [("host", n, 4) for n in (1, 2, 4)]
    assert all(0 <= row["eval_f1"] <= 1 and len(row["calibration_r2"]) == 5 for row in curve["rows"])
    fits = [sum(row["calibration_r2"]) for row in curve["rows"]]
    assert fits == sorted(fits) and fits[0] < fits[2]
    monkeypatch.setattr(runner, "run", None)
    assert pruned_hosts.main(command)["rows"] == curve["rows"]
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    benchmark.main(["record", str(tmp_path / "out"), "--name", "pruned"])
    kept = (tmp_path / "results" / "pruned.json").read_text()
    assert json.loads(kept) == curve and str(tmp_path) not in kept
    assert (tmp_path / "results" / "pruned.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change,match",
    [
        (["--layers", "2", "3"], "2 strings for 1 hosts"),
        (["--layers", "two"], "needs numbers"),
        (["--adapter=x"], None),
    ],
)
def test_bad_flags(change, match, host, tmp_path):
    command = ["--adapter", "a", "--hosts", host, "--layers", "2", "--validation_file", "f"]
    command += ["--output_dir", str(tmp_path / "out"), *change]
    if match is None:
        command, match = [*command, "--do_train"], "This script sets --do_train"
    with pytest.raises(ConfigError, match=match):
        pruned_hosts.main(command)


def test_rank_correlation_is_that_of_the_ranks():
    rows = [
        {"eval_f1": f1, "agreement": share, "calibration_r2": [r2, r2]}
        for f1, share, r2 in ((0.9, 0.8, 0.3), (0.7, 0.6, 0.5), (0.5, 0.1, 0.4))
    ]
    assert pruned_hosts.rank_correlation(rows) == pytest.approx({"agreement": 1.0, "mean_r2": -0.5})
    for row in rows:
        row["agreement"] = 0.5
    assert pruned_hosts.rank_correlation(rows)["agreement"] is None
