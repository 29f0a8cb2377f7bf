"""Properties of adapters and hosts of any shape, tested on random ones."""

import dataclasses
import json
import string
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.configuration_unihyperlora import READER_BITS, TASK_TYPES, read_config
from modeling_unihyperlora.layouts import LAYOUTS, layout_from
from modeling_unihyperlora.modeling_unihyperlora import make_adapter
from modeling_unihyperlora.sites import Site
from modeling_unihyperlora.space import KNOTS, knot_layers, layers_read
from modeling_unihyperlora.storage import WEIGHTS_NAME, StoredTensor, load_adapter, save_adapter
from tests.modeling_unihyperlora.families import VOCABULARY, tiny_host

few = settings(max_examples=25, deadline=None, derandomize=True)
names = st.text(string.ascii_letters, min_size=1, max_size=8).map(lambda name: f"t-{name}")
labels = st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=5, unique=True)
tasks = st.dictionaries(names, st.tuples(st.sampled_from(TASK_TYPES), labels), min_size=1, max_size=3)


@st.composite
def configs(draw) -> UniHyperLoraConfig:
    atoms, width, size = draw(st.integers(1, 20)), draw(st.integers(1, 16)), st.integers(1, 12)
    named = {name: {"type": kind, "labels": given_} for name, (kind, given_) in draw(tasks).items()}
    given_ = {"tasks": named, "delta_step": draw(st.floats(1e-4, 10))}
    if draw(st.booleans()):
        shape = {"name": draw(st.text(max_size=5)), "version": draw(size), "dim": width, "atoms": atoms}
        shape |= {"anchor_words": draw(st.integers(1, 30)), "anchor_text_bytes": draw(st.integers(1, 30))}
        for task in named.values():
            bits = draw(st.sampled_from(READER_BITS))
            task["reader"] = {"width": draw(size), "hidden": draw(size), "bits": bits}
        return UniHyperLoraConfig(space=shape, **given_)
    return UniHyperLoraConfig(
        pathway="inject",
        router=draw(st.sampled_from(["token", "static"])),
        atoms=atoms,
        anchor_dim=width,
        router_top_k=draw(st.integers(1, min(3, atoms))),
        mixer_hidden=draw(size),
        **given_,
    )


@few
@given(config=configs(), seed=st.integers(0, 2**16), scale=st.floats(1e-6, 1e3))
def test_a_file_gives_back_what_was_saved(config, seed, scale):
    """Loaded values equal the values in use, bit for bit, and saving again gives the same tensors."""
    torch.manual_seed(seed)
    adapter = make_adapter(config)
    for module in adapter.modules():
        if isinstance(module, StoredTensor):
            module.latent.data.copy_(scale * torch.randn_like(module.latent))
    for buffer in adapter.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 100)
    with tempfile.TemporaryDirectory() as folder:
        first, again = Path(folder) / "first", Path(folder) / "again"
        save_adapter(adapter, json.loads(config.to_json_string(use_diff=False)), first)
        loaded = make_adapter(read_config(first / "config.json"))
        load_adapter(loaded, first / WEIGHTS_NAME)
        save_adapter(loaded, json.loads(loaded.config.to_json_string(use_diff=False)), again)
        assert (first / "config.json").read_bytes() == (again / "config.json").read_bytes()
        files = [load_file(path / WEIGHTS_NAME) for path in (first, again)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    others = dict(loaded.named_modules())
    for name, module in adapter.named_modules():
        if isinstance(module, StoredTensor):
            assert torch.equal(module(), others[name]()), name
    assert loaded.config.tasks == config.tasks


@few
@given(
    family=st.sampled_from(["bert", "distilbert", "mpnet", "modernbert", "deberta", "eurobert"]),
    heads_width=st.integers(1, 6),
    layers=st.integers(1, 5),
    inner=st.integers(1, 40),
    router=st.sampled_from(["token", "static"]),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_any_shape_of_host(family, heads_width, layers, inner, router, tokens, seed, stir):
    """All sites are found, the update is finite and not zero, merging gives the same, and the host is restored."""
    host = tiny_host(family, width=8 * heads_width, layers=layers, inner=inner, seed=seed)
    ids = torch.randint(2, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    config = UniHyperLoraConfig(pathway="inject", atoms=8, anchor_dim=6, mixer_hidden=3, router=router)
    model = UniHyperLoraForTokenClassification.from_host(host, labels=["a", "b"], config=config).eval()
    assert model.injection.map.coverage() == f"{6 * layers}/{6 * layers}"
    with torch.no_grad():
        plain = host(input_ids=ids).last_hidden_state
        assert torch.equal(model.run(None, None, None, input_ids=ids)["last_hidden_state"], plain)
        run = stir(model).run(None, None, None, input_ids=ids)
        assert torch.isfinite(run["last_hidden_state"]).all() and run["active_atoms"].shape == ids.shape
        if router == "static":
            assert not torch.equal(run["last_hidden_state"], plain)
            model.merge()
            merged = host(input_ids=ids).last_hidden_state
            torch.testing.assert_close(merged, run["last_hidden_state"], atol=1e-3, rtol=1e-3)
        model.detach()
        assert torch.equal(host(input_ids=ids).last_hidden_state, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())


@given(layers=st.integers(1, 300))
def test_knots_of_any_depth(layers):
    at = knot_layers(layers)
    assert at[0] == 0 and at[-1] == layers and at == sorted(at)
    assert all(abs(layer - knot * layers) <= 0.5 for layer, knot in zip(at, KNOTS, strict=True))
    assert set(layers_read(layers)) == set(at) and len(layers_read(layers)) <= min(len(KNOTS), layers + 1)


@given(groups=st.integers(1, 4), width=st.integers(1, 4), roles=st.integers(1, 3))
def test_joined_roles_come_apart_again(groups, width, roles):
    """A fused layer's outputs have ``groups`` groups, each with an equal part for every role, in their order."""
    parts = [torch.arange(groups * width) + 1000 * role for role in range(roles)]
    joined = Site(0, ("query", "key", "value")[:roles], nn.Linear(1, 1), groups).join(parts)
    expected = [
        1000 * role + group * width + i
        for group in range(groups if roles > 1 else 1)
        for role in range(roles)
        for i in range(width if roles > 1 else groups * width)
    ]
    assert joined.tolist() == expected


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_a_layout_survives_its_json(family):
    layout = LAYOUTS[family]
    assert layout_from(json.loads(json.dumps(dataclasses.asdict(layout))), family) == layout
