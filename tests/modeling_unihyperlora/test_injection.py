"""The injected update on hosts of every family, against the paper's formula in float64."""

import pytest
import torch
from torch import nn

from modeling_unihyperlora import (
    HostError,
    MergeError,
    UniHyperLoraConfig,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.layouts import MODULE_TYPES
from modeling_unihyperlora.storage import StoredTensor

FAMILIES = ["bert", "distilbert", "mpnet"]  # for all that there are see test_families.py
LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def hooks_in(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router,top_k", [("token", 1), ("token", 2), ("token", 3), ("static", 2)])
def test_forward_is_the_papers_formula(family, router, top_k, make_model, make_batch, reference):
    model = make_model(family, router=router, router_top_k=top_k, seed=top_k)
    batch = make_batch(seed=3, tokens=9)
    with torch.no_grad():
        out = model(**batch)
        expected = reference(model, batch)
        plain = model.host(**batch).last_hidden_state
    torch.testing.assert_close(out.logits.double(), expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.expected_atoms.double(), expected.expected_atoms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.active_atoms.double(), expected.active_atoms, atol=1e-6, rtol=1e-6)
    if router == "token":
        assert out.active_atoms.max() > out.active_atoms.min() and out.active_atoms.max() <= top_k
    assert (expected.hidden - plain).abs().max() > 0.05, "the update did nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_formula(family, seed, make_model, make_batch, reference):
    """Gradients of a loss of logits and E[k], for all stored values, against autograd through the reference."""
    model = make_model(family, seed=seed)
    batch = make_batch(tokens=5, seed=seed)
    weights = torch.randn(2, 5, len(LABELS), generator=torch.Generator().manual_seed(seed))

    def loss_of(out):
        return (out.logits * weights).mean() + 0.3 * out.expected_atoms.mean()

    loss_of(model(**batch)).backward()
    expected = reference(model, batch)
    loss_of(expected).backward()
    for name, module in model.adapter.named_modules():
        if isinstance(module, StoredTensor):
            gradient = expected.values[name].grad
            assert gradient.abs().max() > 0, f"the reference has no gradient at {name}"
            error = (module.latent.grad.double() - gradient).norm() / gradient.norm()
            assert error < 1e-3, f"{name}: relative error {error:.1e}"
    assert all(parameter.grad is None for parameter in model.host.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_blocks_is_a_site(family, make_model):
    """Except layers for relative positions, and the bottlenecks around MobileBERT's blocks."""
    model = make_model(family)
    sites = model.injection.map.sites
    no_site = ("embedding", "pooler", "pos_", "bottleneck")
    linears = {
        module
        for name, module in model.host.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d) and not any(part in name for part in no_site)
    }
    assert {site.linear for site in sites} == linears
    roles = [(site.block, role) for site in sites for role in site.module_types]
    assert list(dict.fromkeys(roles)) == [(b, t) for b in range(3) for t in MODULE_TYPES]
    assert "18/18 sites" in model.describe()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["token", "static"])
def test_fresh_adapter_leaves_the_function_as_it_was(family, router, make_host, make_batch):
    host = make_host(family)
    batch = make_batch()
    with torch.no_grad():
        before = host(**batch).last_hidden_state
        config = UniHyperLoraConfig(pathway="inject", atoms=16, anchor_dim=12, router=router)
        model = UniHyperLoraForTokenClassification.from_host(host, labels=LABELS, config=config)
        after = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_host_on_its_own_is_untouched_while_attached(family, make_host, make_model, make_batch):
    host, batch = make_host(family), make_batch()
    weights = snapshot(host)
    with torch.no_grad():
        before = host(**batch).last_hidden_state
        model = make_model(host=host)
        adapted = model(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(host(**batch).last_hidden_state, before)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert_same(host, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_host_is_untouched_after_a_forward_that_failed_halfway(family, make_model, make_batch):
    model, batch = make_model(family), make_batch()

    def fail(module, args):
        raise RuntimeError("out of memory, say")

    with torch.no_grad():
        before, adapted = model.host(**batch).last_hidden_state, model(**batch).logits
        handle = model.injection.map.sites[9].linear.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="say"):
            model(**batch)
        handle.remove()
        assert torch.equal(model.host(**batch).last_hidden_state, before)
        assert torch.equal(model(**batch).logits, adapted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["token", "static"])
def test_detach_gives_the_host_back(family, router, make_host, make_model, make_batch):
    host, batch = make_host(family), make_batch()
    next(host.parameters()).requires_grad_(False)
    trainable = [p.requires_grad for p in host.parameters()]
    weights = snapshot(host)
    with torch.no_grad():
        before = host(**batch).last_hidden_state
        model = make_model(host=host, router=router)
        assert hooks_in(host) > 0 and not any(p.requires_grad for p in host.parameters())
        model(**batch)
        if router == "static":
            model.merge()
        assert model.detach() is host
        assert torch.equal(host(**batch).last_hidden_state, before)
    assert hooks_in(host) == 0
    assert_same(host, weights)
    assert [p.requires_grad for p in host.parameters()] == trainable


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_computes_the_same_and_unmerge_is_exact(family, make_model, make_batch):
    model, batch = make_model(family, router="static"), make_batch()
    weights = snapshot(model.host)
    with torch.no_grad():
        plain, beside = model.host(**batch).last_hidden_state, model(**batch)
        model.merge()
        model.merge()  # twice is once
        merged = model(**batch)
        in_host = model.host(**batch).last_hidden_state
        torch.testing.assert_close(merged.logits, beside.logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(in_host, plain, atol=1e-3), "merging did nothing"
        model.unmerge()
        assert_same(model.host, weights)
        assert torch.equal(model(**batch).logits, beside.logits)


def test_merged_weight_is_w_plus_delta_in_float64(make_model, reference, make_batch):
    model = make_model("bert", router="static")
    run = reference(model, make_batch())
    site = model.injection.map.sites[10]  # block 1, ffn_up
    assert (site.block, site.module_types) == (1, ("ffn_up",))
    values, before = run.values, site.linear.weight.double()
    place = torch.tensor([1, 2 / 3, 0, 0, 0, 0, 1, 0], dtype=torch.float64)
    wave = torch.cat([torch.sin(values["mixer.hidden"] @ place), torch.ones(1, dtype=torch.float64)])
    c = values["mixer.output"] @ wave + place @ values["tasks.ner.delta"]
    gate = model.adapter.tasks["ner"].mean_gate.half().double()
    projector = model.adapter.projector
    delta = torch.zeros_like(before)
    for j in range(16):
        out = projector.outward(64).double() @ values["atoms_out"][j]
        delta += gate[j] * c[j] * torch.outer(out, values["atoms_in"][j] @ projector.inward(32).double())
    model.merge()
    torch.testing.assert_close(site.linear.weight.double(), before + delta.detach(), atol=1e-6, rtol=1e-6)


def test_merge_is_refused_with_the_token_router(make_model, make_batch):
    model, batch = make_model(), make_batch()
    weights, before = snapshot(model.host), model(**batch).logits
    with pytest.raises(MergeError, match="router='static'"):
        model.merge()
    assert_same(model.host, weights)
    assert torch.equal(model(**batch).logits, before)


def test_merge_that_would_overflow_changes_nothing(make_model):
    model = make_model(host=None, router="static")
    model.host.half()
    with torch.no_grad():
        model.adapter.atoms_out.latent.mul_(1e8)
    weights = snapshot(model.host)
    with pytest.raises(HostError, match="not finite"):
        model.merge()
    assert_same(model.host, weights)
    assert not model.injection.merged


def test_merged_host_serves_no_other_task(make_model, make_batch, stir):
    model, batch = make_model(router="static"), make_batch()
    model.add_task("other", LABELS)
    stir(model)
    model.set_task("ner")
    model.merge()
    for attempt in (
        lambda: model(**batch, task="other"),
        lambda: model.set_task("other"),
        lambda: model.add_task("third", LABELS),
    ):
        with pytest.raises(MergeError, match="unmerge"):
            attempt()
    assert model.config.active_task == "ner" and sorted(model.config.tasks) == ["ner", "other"]
    model.unmerge()
    model(**batch, task="other")


@pytest.mark.parametrize("router", ["token", "static"])
def test_two_tasks_share_the_dictionary_and_differ_in_output(router, make_model, make_batch, stir, reference):
    model, batch = make_model(router=router), make_batch()
    shared = {name: p for name, p in model.adapter.named_parameters() if not name.startswith("tasks.")}
    model.add_task("chunks", ["O", "B", "I"])
    stir(model, seed=5)
    assert {name: p for name, p in model.adapter.named_parameters() if not name.startswith("tasks.")} == shared
    with torch.no_grad():
        by_argument = {name: model(**batch, task=name) for name in ("ner", "chunks")}
        assert by_argument["ner"].logits.shape[-1] == 5 and by_argument["chunks"].logits.shape[-1] == 3
        for name in ("ner", "chunks", "ner"):  # back and forth: nothing kept from one task serves the other
            model.set_task(name)
            assert torch.equal(model(**batch).logits, by_argument[name].logits)
            assert model.labels == model.config.tasks[name]["labels"]
            expected = reference(model, batch)
            torch.testing.assert_close(
                by_argument[name].logits.double(), expected.logits.detach(), atol=1e-4, rtol=1e-4
            )
        states = [model(**batch, task=name, output_hidden_states=True).hidden_states[-1] for name in by_argument]
    assert not torch.allclose(*states, atol=1e-3)


def test_other_tasks_and_values_are_never_served_from_what_was_kept(make_model, make_batch):
    """Projected atoms are cached between passes without gradients; a change of any part must take effect at once."""
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        last = model(**batch).logits
        for name, module in model.adapter.named_modules():
            if isinstance(module, StoredTensor):
                module.latent.mul_(-1)
                now = model(**batch).logits
                assert not torch.equal(now, last), name
                last = now
        model.config.router = "static"
        last = model(**batch).logits
        model.adapter.tasks["ner"].mean_gate.mul_(2)
        assert not torch.equal(model(**batch).logits, last)


def test_inference_mode(make_model, make_batch):
    batch, expected = make_batch(), make_model()(**make_batch()).logits.detach()
    with torch.inference_mode():
        made_inside = make_model()
        assert torch.equal(made_inside(**batch).logits, expected)
        made_inside.adapter.atoms_out.latent.neg_()
        assert not torch.equal(made_inside(**batch).logits, expected)
    model = make_model()
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    model(**batch).logits.sum().backward()
    assert model.adapter.atoms_out.latent.grad.abs().max() > 0


def test_training_keeps_the_host_without_dropout(make_host, make_model, make_batch):
    host = make_host()
    for module in host.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model, batch = make_model(host=host), make_batch()
    evaluated = model(**batch).logits
    model.train()
    assert torch.equal(model(**batch).logits, evaluated)
    assert model.training and model.adapter.training and not any(m.training for m in host.modules())


def test_mixed_precision_leaves_no_trace_in_what_is_kept(make_model, make_batch):
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        before = model(**batch).logits
        model.adapter.atoms_in.latent.add_(0)  # new version: what was kept does not count any more
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**batch).logits
        assert torch.equal(model(**batch).logits, before)
    torch.testing.assert_close(low.float(), before, atol=0.2, rtol=0.1)
    assert not torch.equal(low.float(), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["token", "static"])
def test_padding_does_not_change_real_tokens(family, router, make_model, make_batch):
    model = make_model(family, router=router)
    batch = make_batch(sentences=1, tokens=5)
    wide = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((1, 6), 1)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(1, 6, dtype=torch.long)], dim=1),
    }
    with torch.no_grad():
        alone, padded = model(**batch), model(**wide)
    for name in ("logits", "expected_atoms", "active_atoms"):
        torch.testing.assert_close(padded[name][:, :5], alone[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["token", "static"])
def test_bfloat16_host_is_near_float32(family, router, make_host, make_model, make_batch):
    model, batch = make_model(family, router=router), make_batch()
    low = make_model(host=make_host(family).to(torch.bfloat16), router=router)
    low.adapter.load_state_dict(model.adapter.state_dict())
    with torch.no_grad():
        out, out_low = model(**batch), low(**batch)
        plain = model.host(**batch).last_hidden_state
        adapted = model(**batch, output_hidden_states=True).hidden_states[-1]
        adapted_low = low(**batch, output_hidden_states=True).hidden_states[-1]
    assert adapted_low.dtype == torch.bfloat16 and torch.isfinite(out_low.logits).all()
    error = (adapted_low.float() - adapted).norm() / adapted.norm()
    assert error < 0.25 * (adapted - plain).norm() / adapted.norm(), f"error {error:.3f} of the size of the update"
    assert out_low.expected_atoms.dtype == out.expected_atoms.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_model_in_half_precision_trains_a_step(dtype, make_model, make_batch):
    model, batch = make_model().to(dtype).train(), make_batch()
    labels = torch.zeros_like(batch["input_ids"])
    out = model(**batch, labels=labels)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_two_models_on_one_host_do_not_disturb_each_other(make_host, make_model, make_batch):
    host, batch = make_host(), make_batch()
    first, second = make_model(host=host, seed=1), make_model(host=host, seed=2)
    alone = make_model(host=make_host(), seed=1)
    with torch.no_grad():
        expected = alone(**batch).logits
        second(**batch)
        assert torch.equal(first(**batch).logits, expected)
        second.detach()
        assert torch.equal(first(**batch).logits, expected)


class TestMeanGate:
    """The running mean that the static router uses."""

    @staticmethod
    def expected_after_one_pass(model, batch, before, reference):
        """For each block in turn, move the running mean by one per cent towards the mean gates of the real tokens."""
        gates = []
        hooks = [
            block.register_forward_hook(lambda *_: gates.append(model.injection.current.routing))
            for block in model.injection.map.blocks
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        real = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else slice(None)
        mean = before.double()
        for routing in gates:
            total = torch.zeros(16, dtype=torch.float64)
            chosen, values = routing.atoms[real], routing.gates[real]
            for atoms, gate in zip(chosen, values, strict=True):
                for j, g in zip(atoms, gate, strict=True):
                    total[j] += g.double()
            mean = 0.99 * mean + 0.01 * total / len(chosen)
        return mean

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_padding_does_not_count(self, with_mask, make_model, make_batch, reference):
        model, batch = make_model(), make_batch()
        if not with_mask:
            batch.pop("attention_mask")
        own = model.adapter.tasks["ner"]
        before = own.mean_gate.clone()
        expected = self.expected_after_one_pass(model, batch, before, reference)
        with torch.no_grad():
            model.train()(**batch)
        assert torch.equal(own.mean_gate, before), "a pass without gradient moved the mean"
        model.train()(**batch)
        torch.testing.assert_close(own.mean_gate.double(), expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(own.mean_gate, before)

    def test_moves_with_the_task_and_not_with_delta_alone(self, make_model, make_batch):
        model, batch = make_model(), make_batch()
        model.add_task("other", LABELS)
        before = {name: task.mean_gate.clone() for name, task in model.adapter.tasks.items()}
        model.config.tasks["other"]["trained"] = True
        model.set_train_scope("delta")
        model.train()(**batch)
        assert all(torch.equal(task.mean_gate, before[name]) for name, task in model.adapter.tasks.items())
        model.set_train_scope("task")
        model.train()(**batch)
        assert torch.equal(model.adapter.tasks["ner"].mean_gate, before["ner"])
        assert not torch.equal(model.adapter.tasks["other"].mean_gate, before["other"])
