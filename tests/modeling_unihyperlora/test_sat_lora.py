"""SAT-LoRA, the adapter that is bound to one host: its formula, its file, and the refusal of other hosts."""

import json

import pytest
import torch

from modeling_unihyperlora import (
    AdapterFileError,
    ConfigError,
    HostError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.layouts import MODULE_TYPES
from modeling_unihyperlora.measure.accounting import measure
from modeling_unihyperlora.measure.inspection import inspect_adapter
from modeling_unihyperlora.publish.hub import stage
from modeling_unihyperlora.storage import WEIGHTS_NAME, StoredTensor

BOUND = {"projector": "host", "atoms": 4}


def sat_reference(model, batch) -> torch.Tensor:
    """Logits (B, T, C) of a BERT in float64: every token's ΔW of every layer as an explicit matrix."""
    config, adapter, host = model.config, model.adapter, model.host
    values = {n: m().detach().double() for n, m in adapter.named_modules() if isinstance(m, StoredTensor)}
    weights = {name: tensor.double() for name, tensor in host.state_dict().items()}
    blocks, heads = host.config.num_hidden_layers, host.config.num_attention_heads
    targets = config.target_modules or MODULE_TYPES

    def linear(x, name, block, kind, gates):  # x (B, T, in)
        prefix = f"encoder.layer.{block}.{name}"
        weight = weights[f"{prefix}.weight"]
        out = x @ weight.T + weights[f"{prefix}.bias"]
        if MODULE_TYPES[kind] not in targets:
            return out
        shape, number = f"{weight.shape[1]}x{weight.shape[0]}", 0 if config.share_across_layers else block
        v, u = values[f"atoms_in.{shape}"][number], values[f"atoms_out.{shape}"][number]
        place = torch.zeros(8, dtype=torch.float64)
        place[0], place[1], place[2 + kind] = 1, (block + 1) / blocks, 1
        wave = torch.cat([torch.sin(values["mixer.hidden"] @ place), torch.ones(1, dtype=torch.float64)])
        c = config.atom_scale * (values["mixer.output"] @ wave)
        delta = torch.einsum("btm,m,mo,mi->btoi", gates, c, u, v)
        return out + torch.einsum("btoi,bti->bto", delta, x)

    def norm(x, name):
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift, host.config.layer_norm_eps)

    state = host.embeddings(batch["input_ids"]).double()
    states, hidden = [state], batch["attention_mask"][:, None, None, :].double()
    for block in range(blocks):
        number = 0 if config.share_across_layers else block
        router = values["router_weight"][number]
        bias = values["router_bias"][number] + router @ values["tasks.ner.embedding"]
        scores = state @ router.T / state.square().mean(dim=-1, keepdim=True).sqrt() + bias
        best = scores.topk(config.router_top_k, dim=-1).indices
        kept = torch.zeros_like(scores).scatter(-1, best, 1.0) * (scores > 0)
        gates = torch.sigmoid(scores) * kept
        attention = "attention.self"
        q, k, v = (
            linear(state, f"{attention}.{name}", block, kind, gates).unflatten(-1, (heads, -1)).transpose(1, 2)
            for kind, name in enumerate(("query", "key", "value"))
        )
        score = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = score.masked_fill(hidden == 0, -torch.inf).softmax(dim=-1) @ v
        mixed = linear(mixed.transpose(1, 2).flatten(-2), "attention.output.dense", block, 3, gates)
        state = norm(mixed + state, f"encoder.layer.{block}.attention.output.LayerNorm")
        up = torch.nn.functional.gelu(linear(state, "intermediate.dense", block, 4, gates))
        down = linear(up, "output.dense", block, 5, gates)
        state = norm(down + state, f"encoder.layer.{block}.output.LayerNorm")
        states.append(state)
    weight = values["tasks.ner.head_weight"].unflatten(-1, (5, -1))
    logits = values["tasks.ner.head_bias"]
    for knot in range(5):
        state = states[int(blocks * knot / 4 + 0.5)]
        logits = logits + state / state.square().mean(dim=-1, keepdim=True).sqrt() @ weight[:, knot].T
    return logits


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("top_k", "targets"), [(1, None), (2, None), (2, ["query", "value", "ffn_down"])])
def test_forward_is_the_formula(shared, top_k, targets, make_model, make_batch):
    own = {"share_across_layers": shared, "router_top_k": top_k, "target_modules": targets, "atom_scale": 2.0}
    model = make_model("bert", **BOUND, **own)
    batch = make_batch(seed=3, tokens=9)
    with torch.no_grad():
        out, plain = model(**batch), model.host(**batch).last_hidden_state
        hidden = model.run(None, **batch, output_hidden_states=None)["last_hidden_state"]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits.double()[real], sat_reference(model, batch)[real], atol=1e-4, rtol=1e-4)
    assert (hidden - plain).abs().max() > 0.05, "the update did nothing"
    assert 0 < out.active_atoms.max() <= top_k


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert", "distilbert"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_fresh_one_leaves_the_function_as_it_was(family, shared, make_host, make_model, make_batch):
    batch = make_batch()
    plain = make_host(family)(**batch).last_hidden_state
    model = make_model(family, **BOUND, share_across_layers=shared, fresh=True)
    run = model.run(None, **batch, output_hidden_states=None)
    assert torch.equal(run["last_hidden_state"], plain)


@pytest.mark.parametrize("cls", [UniHyperLoraForTokenClassification, UniHyperLoraForSequenceClassification])
@pytest.mark.parametrize("shared", [True, False])
def test_saved_and_loaded_it_computes_the_same(shared, cls, make_host, make_model, make_batch, tmp_path):
    batch = make_batch()
    own = {"share_across_layers": shared, "target_modules": ["query", "ffn_up"], "atom_scale": 2.0}
    model = make_model("bert", cls=cls, **BOUND, **own)
    with torch.no_grad():
        before = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path, host=make_host("bert"))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, before)
    figures = measure(again, folder=tmp_path)
    assert figures["adapter_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert figures["delta_bytes"] is None
    sets, width = (1 if shared else model.host.config.num_hidden_layers), model.host.config.hidden_size
    inner = model.host.config.intermediate_size
    atoms = sets * 4 * (2 * width + 2 * (width + inner)) + 2 * sets * 4 * 6  # int8, a bfloat16 an atom and side
    assert figures["parts"]["dictionary"] == atoms


@pytest.mark.parametrize("shared", [True, False])
def test_it_goes_on_no_other_host(shared, make_host, make_model, make_batch, tmp_path):
    make_model("bert", **BOUND, share_across_layers=shared).save_pretrained(tmp_path)
    others = {
        r"other fingerprint\.": make_host("bert", seed=5),
        "other fingerprint, hidden_size, .*shapes": make_host("bert", width=48),
        r"other fingerprint, num_layers\.": make_host("bert", layers=5),
        "other family, fingerprint": make_host("distilbert"),
    }
    for what, other in others.items():
        batch = make_batch()
        before = other(**batch).last_hidden_state
        with pytest.raises(HostError, match=f"bound to the host that it was trained on .*{what}"):
            UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=other)
        assert torch.equal(other(**batch).last_hidden_state, before)
        free = UniHyperLoraConfig(pathway="inject")
        UniHyperLoraForTokenClassification.from_host(
            other, labels=["a", "b"], config=free
        ).detach()  # free for another adapter


def test_it_is_inspected_and_staged_like_any_other(make_host, make_model, tmp_path):
    """Code that reads an adapter's file without its host must make the right kind of adapter."""
    make_model("bert", host=make_host("bert"), **BOUND).save_pretrained(tmp_path / "saved")
    report = inspect_adapter(tmp_path / "saved")
    bits = {row["name"].partition(".")[0]: row["bits"] for row in report["tensors"]}
    assert (bits["atoms_in"], bits["mixer"], report["config"].projector) == (8, 8, "host")
    (tmp_path / "staged").mkdir()
    stage(tmp_path / "saved", tmp_path / "staged", "user/adapter")
    staged, saved = (tmp_path / name / WEIGHTS_NAME for name in ("staged", "saved"))
    assert staged.read_bytes() == saved.read_bytes()


def test_its_own_host_in_half_precision(make_host, make_model, make_batch, tmp_path):
    model, batch = make_model("bert", **BOUND), make_batch()
    model.save_pretrained(tmp_path)
    half = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=make_host("bert").bfloat16())
    with torch.no_grad():
        far = (half(**batch).logits.float() - model(**batch).logits).abs()[batch["attention_mask"].bool()]
    assert far.median() < 0.1


def test_what_is_trained(make_model, make_batch):
    model, batch = make_model("bert", **BOUND, share_across_layers=False), make_batch()
    model.add_task("second", ["x", "y", "z"])
    model.set_train_scope("task")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("host.") for name in names)
    tasks = {name for name in names if ".tasks." in name}
    own = ("embedding", "head_weight", "head_bias")
    assert tasks == {f"adapter.tasks.second.{name}.latent" for name in own}
    model.set_task("ner")
    model.set_train_scope("task")
    model.train()
    loss = model(**batch, labels=batch["input_ids"] % 5).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in names - tasks or ".tasks.ner." in name and "delta" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    with pytest.raises(ConfigError, match="bound to its host"):
        model.set_train_scope("delta")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"pathway": "inject", "projector": "host", "router": "static"}, "needs router='token'"),
        ({"projector": "host", "pathway": "stream"}, "projector is for an injected update"),
        ({"pathway": "inject", "projector": "host", "target_modules": ["q"]}, r"target_modules=\['q'\]"),
        ({"pathway": "inject", "projector": "host", "target_modules": []}, r"target_modules=\[\]"),
        ({"pathway": "inject", "projector": "host", "atom_scale": 0}, "atom_scale=0"),
        ({"pathway": "inject", "projector": "host", "share_across_layers": "yes"}, "share_across_layers='yes'"),
        ({"pathway": "inject", "target_modules": ["query"]}, "need projector='host', but"),
        ({"pathway": "inject", "atom_scale": 2.0}, "need projector='host', but"),
    ],
)
def test_configurations_that_are_refused(given, expected):
    with pytest.raises(ConfigError, match=expected):
        UniHyperLoraConfig(**given)


def test_it_needs_a_host_to_be_bound_to(make_host):
    with pytest.raises(ConfigError, match="make the adapter with from_host"):
        UniHyperLoraForTokenClassification(
            UniHyperLoraConfig(pathway="inject", projector="host"), host=make_host("bert")
        )


@pytest.mark.parametrize(
    "change",
    [
        None,
        {},
        "bert",
        {"num_layers": 10**9},
        {"shapes": []},
        {"shapes": [[0, 4]]},
        {"shapes": [[8, 16000]] * 64},
        {"shapes": [[32, 32]]},
        {"fingerprint": 3},
    ],
)
def test_a_damaged_configuration(change, make_host, make_model, tmp_path):
    make_model("bert", **BOUND).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["bound_host"] = content["bound_host"] | change if isinstance(change, dict) and change else change
    content["atoms"] = 4096 if change == {"shapes": [[8, 16000]] * 64} else content["atoms"]
    path.write_text(json.dumps(content))
    with pytest.raises((ConfigError, AdapterFileError)):
        UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=make_host("bert"))
