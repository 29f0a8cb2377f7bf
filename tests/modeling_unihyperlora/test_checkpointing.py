"""Gradient checkpointing of the host: the same gradients with fewer saved tensors, and the host is restored."""

import pytest
import torch

from modeling_unihyperlora import ConfigError

FAMILIES = ["bert", "albert", "distilbert", "mpnet", "deberta-v2", "squeezebert", "modernbert"]


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients by name, and bytes saved for the backward pass, each tensor counted once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        held.append(x)
        return x

    held: list[torch.Tensor] = []
    model.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch, labels=batch["input_ids"] % 5).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sum(kept.values())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("router", ["token", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients_from_fewer_tensors(family, router, make_model, make_batch):
    model, batch = make_model(family, router=router), make_batch(4, 16)
    loss, gradients, kept = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    again, checkpointed, less = loss_and_gradients(model, batch)
    assert again == loss and same(checkpointed, gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    assert less < 0.8 * kept
    model.gradient_checkpointing_disable()
    assert loss_and_gradients(model, batch)[2] == kept


def test_every_other_block(make_model, make_batch):
    model, batch = make_model(), make_batch(4, 16)
    sizes = []
    for every in (1, 2, 100):
        model.gradient_checkpointing_enable(every_n_layers=every)
        sizes.append(loss_and_gradients(model, batch)[2])
    assert sizes[0] < sizes[1] < sizes[2]


def test_blocks_are_left_as_they_were(make_model, make_batch):
    """Blocks are restored also after an error, and if a block had its own forward."""
    model, batch = make_model(), make_batch()
    first, last = model.injection.map.blocks[0], model.injection.map.blocks[-1]
    own = first.forward
    first.forward = own
    model.gradient_checkpointing_enable()
    model.train()(**batch)
    assert vars(first)["forward"] is own and "forward" not in vars(last)
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        model(**batch)
    handle.remove()
    assert vars(first)["forward"] is own and "forward" not in vars(last)


def test_the_way_back_may_be_another_adapters_pass(make_model, make_host, make_batch):
    """Two adapters on one host, with both backward passes after both forward passes."""
    host, batch = make_host(), make_batch()
    models = [make_model(host=host, seed=seed) for seed in (0, 1)]
    expected = [loss_and_gradients(model, batch)[1] for model in models]
    for model in models:
        model.gradient_checkpointing_enable()
        model.zero_grad()
    losses = [model.train()(**batch, labels=batch["input_ids"] % 5).loss for model in models]
    for model, loss, gradients in zip(models, losses, expected, strict=True):
        loss.backward()
        found = {name: p.grad for name, p in model.adapter.named_parameters() if p.grad is not None}
        assert same(found, gradients)


@pytest.mark.parametrize("refused", [{"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"offload": True}])
def test_what_cannot_be_done_is_refused(refused, make_model):
    with pytest.raises(ConfigError, match="use_reentrant"):
        make_model().gradient_checkpointing_enable(**refused)
