"""A stream with an injected update on top: zero until δθ is tuned, on one host, mergeable, left out on any other."""

import copy
import logging
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from modeling_unihyperlora import (
    BudgetError,
    ConfigError,
    HostError,
    MergeError,
    UniHyperLoraConfig,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.accounting import check_budget, flops_overhead_pct, measure, merged_flops_overhead_pct
from modeling_unihyperlora.hosts import MODULE_TYPES
from modeling_unihyperlora.inspection import inspect_on_host
from tests.conftest import piece_tokenizer
from tests.modeling_unihyperlora.test_stream import LABELS, WORDS, bert

D, M = 12, 16
SHAPE = {"pathway": "stream", "stream_dim": D, "atoms": M, "stream_width": 10, "stream_hidden": 6}


@pytest.fixture(scope="module")
def words():
    return piece_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "un", "##known"], 64)


@pytest.fixture(scope="module")
def stream(words, tmp_path_factory):
    """Folder of a stream adapter in which every part matters, and the name of its host."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setenv("UNIHYPERLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        host, anchors = tmp_path_factory.mktemp("host"), tmp_path_factory.mktemp("anchors") / "anchors.txt"
        lines = (" ".join(np.random.default_rng(seed).choice(WORDS, 8)) for seed in range(60))
        anchors.write_text("\n".join(lines) + "\n", encoding="utf-8")
        bert(32, 3).save_pretrained(host)
        words.save_pretrained(host)
        made = UniHyperLoraForTokenClassification.from_host(
            host, labels=LABELS, task="people", config=UniHyperLoraConfig(**SHAPE), anchor_file=anchors
        )
        torch.manual_seed(7)
        for parameter in made.adapter.parameters():
            if parameter is not made.adapter.anchors.coordinates.latent:
                parameter.data += 0.3 * torch.randn_like(parameter)
        made.config.tasks["people"]["trained"] = True
        made.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
        return folder, host


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(stream, words):
    """load(host=…, folder=…) → the stream adapter, or one saved since, on its own host or another."""

    def load_(host=None, folder=None):
        host = bert(32, 3) if host is None else host
        return UniHyperLoraForTokenClassification.from_pretrained(folder or stream[0], host=host, tokenizer=words)

    return load_


@pytest.fixture
def both(load):
    """The same with an update that does something."""
    model = load()
    model.add_injection()
    with torch.no_grad():
        model.adapter.tasks["people"].delta_injected.latent.copy_(torch.randn(8, M) / 8)
    return model


@pytest.fixture
def batch(words):
    return words([" ".join(WORDS[:9]), "word3 unknown word4"], return_tensors="pt", padding=True)


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(**batch).logits


def test_one_layer_computes_the_formula(both, batch):
    block, kind, linear = 1, "ffn_up", both.host.encoder.layer[1].intermediate.dense
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output.clone())))
    logits(both, batch)  # that hook comes after the adapter's own
    handle.remove()
    x, found = (value.double() for value in seen[0])
    assert len(seen) == 1

    def columns(width: int) -> torch.Tensor:  # (width, D): the DCT-II of each coordinate
        grid = [[math.cos(math.pi * m * (i + 0.5) / width) for m in range(D)] for i in range(width)]
        return torch.tensor(grid, dtype=torch.float64) * math.sqrt(2 / width)

    delta = both.adapter.tasks["people"].delta_injected().detach().double()
    weight = delta[0] + (block + 1) / 3 * delta[1] + delta[2 + MODULE_TYPES.index(kind)]
    u, v = (part().detach().double() for part in (both.adapter.atoms_out, both.adapter.atoms_in))
    update = sum(weight[j] * torch.outer(columns(64) @ u[j], v[j] @ columns(32).T) for j in range(M))
    expected = x @ (linear.weight.double() + update).T + linear.bias.double()
    assert update.abs().max() > 0.01
    assert (found - expected).abs().max() < 1e-5


def test_at_zero_it_is_the_stream_bit_for_bit(load, batch):
    model, host = load(), bert(32, 3)
    before = logits(model, batch)
    model.add_injection()
    assert torch.equal(logits(model, batch), before)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        bare = host(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states, bare, strict=True))


def test_merging_is_exact_and_free_and_undone_to_the_bit(both, load, batch):
    unmerged, weights = logits(both, batch), copy.deepcopy(both.host.state_dict())
    own = both.host
    bare = logits(load(), batch)
    assert (unmerged - bare).abs().max() > 1e-3
    both.merge()
    assert both.merged and torch.allclose(logits(both, batch), unmerged, atol=1e-5)
    assert flops_overhead_pct(both.path, 3) == flops_overhead_pct(load().path, 3) == merged_flops_overhead_pct(both)
    for refused in (both.calibrate, lambda: both.set_train_scope("delta")):
        with pytest.raises(MergeError, match=r"unmerge\(\)"):
            refused()
    both.unmerge()
    assert torch.equal(logits(both, batch), unmerged)
    both.merge()
    assert both.detach() is own
    assert all(torch.equal(value, weights[name]) for name, value in own.state_dict().items())
    with torch.no_grad():
        assert torch.equal(own(**batch).last_hidden_state, bert(32, 3)(**batch).last_hidden_state)


def test_a_saved_one_loads_and_scores_the_same(both, load, batch, tmp_path, stream):
    both.save_pretrained(tmp_path / "saved")
    again = load(folder=tmp_path / "saved")
    assert again.config.pathway == "both" and torch.equal(logits(again, batch), logits(both, batch))
    figures, plain = measure(again, tmp_path / "saved"), measure(load())
    assert figures["delta_bytes"] == 2 * plain["delta_bytes"] == 2 * 8 * M // 2
    assert figures["parts"]["delta"] == figures["delta_bytes"]
    named = UniHyperLoraForTokenClassification.from_pretrained(tmp_path / "saved", base_model_name_or_path=stream[1])
    assert torch.equal(logits(named, batch), logits(both, batch))
    assert "an update at 18/18 sites" in named.describe()
    report = inspect_on_host(tmp_path / "saved", stream[1])
    assert report["sites"] == dict.fromkeys(MODULE_TYPES, 3) and len(report["knots"]) == 5


@pytest.mark.parametrize("is_new", [False, True])
def test_only_delta_gets_a_gradient_and_a_new_head(both, batch, is_new):
    both.config.tasks["people"]["trained"] = not is_new
    both.set_train_scope("delta")
    both.train()
    loss = both(**batch, labels=torch.randint(0, 3, batch["input_ids"].shape)).loss
    loss.backward()
    found = {name for name, p in both.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {"delta", "delta_injected"} | ({"head_weight", "head_bias"} if is_new else set())
    assert found == {f"adapter.tasks.people.{name}.latent" for name in expected}
    assert not both.host.training


def test_every_task_has_its_own(both, batch):
    people = logits(both, batch)
    both.add_task("places", ["O", "B-LOC"])
    states = [both(**batch, task=task, output_hidden_states=True).hidden_states[-1] for task in ("people", "places")]
    assert torch.equal(states[1], bert(32, 3)(**batch).last_hidden_state)
    assert not torch.equal(*states)
    both.set_task("people")
    assert torch.equal(logits(both, batch), people)
    both.merge()
    with pytest.raises(MergeError):
        both.set_task("places")


def test_copies_and_threads_do_not_disturb_each_other(both, batch):
    expected, twin = logits(both, batch), copy.deepcopy(both)
    with torch.no_grad():
        twin.adapter.tasks["people"].delta_injected.latent.zero_()
    changed = logits(twin, batch)
    assert not torch.equal(changed, expected)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(logits, model, batch) for model in (both, twin) * 8]
        assert all(torch.equal(run.result(), one) for run, one in zip(runs, (expected, changed) * 8, strict=True))


def test_on_another_host_the_stream_goes_on_alone(both, load, batch, tmp_path, caplog):
    both.save_pretrained(tmp_path / "saved")
    other = bert(24, 2, seed=5)
    with caplog.at_level(logging.WARNING):
        elsewhere = load(other, tmp_path / "saved")
    assert sum("tuned on another host" in record.message for record in caplog.records) == 1
    assert torch.equal(logits(elsewhere, batch), logits(load(bert(24, 2, seed=5)), batch))
    with pytest.raises(MergeError, match="no update to merge"):
        elsewhere.merge()
    with pytest.raises(ConfigError, match=r"call add_injection\(\)"):
        elsewhere.set_train_scope("delta")

    alone = logits(elsewhere, batch)
    elsewhere.add_injection()  # begins at zero here
    assert torch.equal(logits(elsewhere, batch), alone)
    assert elsewhere.config.injected_host["hidden_size"] == 24
    elsewhere.set_train_scope("delta")
    of_same_shape = load(bert(32, 3, seed=9), tmp_path / "saved")
    assert of_same_shape.injection is None


def test_in_another_precision_it_is_the_same_host(both, load, batch, tmp_path):
    both.save_pretrained(tmp_path / "saved")
    half = load(bert(32, 3).bfloat16(), tmp_path / "saved")
    assert half.injection is not None
    assert torch.isfinite(logits(half, batch)).all()


def test_the_budget_is_that_of_a_merged_one(both, load):
    merged, unmerged = merged_flops_overhead_pct(both), flops_overhead_pct(both.path, 3)
    sites = both.injection.map.sites
    added = sum(
        M * (s.widths["input"] * (s.module_types[0] not in ("key", "value")) + s.widths["output"]) for s in sites
    )
    assert unmerged - merged == pytest.approx(100 * added / both.path.host_multiply_adds(128))
    check_budget(both, max_flops_overhead_pct=(merged + unmerged) / 2)
    with pytest.raises(BudgetError):
        check_budget(both, max_flops_overhead_pct=merged * 0.99)
    figures = measure(both)
    assert figures["flops_overhead_pct"] == pytest.approx(unmerged, abs=1e-4)
    assert figures["merged_flops_overhead_pct"] == pytest.approx(merged, abs=1e-4)
    assert measure(load())["merged_flops_overhead_pct"] is None


class TestRefused:
    def test_training_the_stream_below_it(self, both):
        with pytest.raises(ConfigError, match="choose train_scope='delta'"):
            both.set_train_scope("source")

    def test_cached_states(self, both):
        with pytest.raises(ConfigError, match="Give input_ids"):
            both(canonical_states=torch.zeros(1, 2, 5, D), attention_mask=torch.ones(1, 2))

    def test_tasks_mixed_in_a_batch(self, both, batch):
        with pytest.raises(ConfigError, match="one task at a time"):
            both(**batch, task_ids=["people"] * 2)

    def test_a_fresh_one(self, both):
        with pytest.raises(ConfigError, match="not trained from nothing"):
            UniHyperLoraConfig(pathway="both")
        with pytest.raises(ConfigError, match="not made afresh"):
            UniHyperLoraForTokenClassification.from_host(bert(32, 3), labels=LABELS, config=both.config)

    def test_a_host_record_that_is_none(self, both):
        record = both.config.injected_host
        with pytest.raises(ConfigError, match="goes with pathway='both' alone"):
            UniHyperLoraConfig(pathway="stream", injected_host=record)
        for bad in (record | {"hidden_size": -1}, record | {"fingerprint": 3}, {"family": "bert"}, ["bert"]):
            with pytest.raises(ConfigError, match="does not describe a host"):
                UniHyperLoraConfig(pathway="both", injected_host=bad)

    def test_an_injected_adapter(self, make_model):
        with pytest.raises(ConfigError, match="on top of a stream"):
            make_model().add_injection()

    def test_a_family_that_is_unknown_changes_nothing(self, load, batch):
        host = bert(32, 3)
        host.config.model_type = "unheard-of"
        model = load(host)
        before = logits(model, batch)
        hooks = [len(module._forward_hooks) for module in host.modules()]  # transformers has its own
        with pytest.raises(HostError, match="unheard-of"):
            model.add_injection()
        assert model.config.pathway == "stream" and model.config.injected_host is None and model.injection is None
        assert model.adapter.tasks["people"].delta_injected is None
        assert torch.equal(logits(model, batch), before)
        assert [len(module._forward_hooks) for module in host.modules()] == hooks

    def test_exports_of_an_update_alone(self, both, tmp_path):
        with pytest.raises(MergeError, match="no update of weights"):
            both.merge_and_save(tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_onnx_has_the_update_in_the_host(both, batch, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    expected = logits(both, batch)
    both.export_onnx(tmp_path / "model.onnx")
    assert not both.merged and torch.equal(logits(both, batch), expected)
    given = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    [found] = runtime.InferenceSession(tmp_path / "model.onnx").run(None, given)
    real = batch["attention_mask"].bool()
    assert torch.allclose(torch.tensor(found)[real], expected[real], atol=1e-3)
