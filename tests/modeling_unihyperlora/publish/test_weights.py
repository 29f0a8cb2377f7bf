"""Exports compared with their model: a merged encoder, a LoRA for PEFT, one ONNX file."""

import json
import re

import pytest
import torch
from transformers import AutoModel

from modeling_unihyperlora import ExportError, MergeError, UniHyperLoraForSequenceClassification
from modeling_unihyperlora.publish.weights import HEAD_NAME, low_rank
from tests.conftest import tiny_tokenizer
from tests.modeling_unihyperlora.conftest import LABELS

FAMILIES = ["bert", "distilbert", "mpnet"]


@pytest.fixture
def static(make_model, make_host, tmp_path):
    """static("bert") → a model with the static router, on a host from a folder."""

    def make(family: str = "bert", **more):
        host = make_host(family)
        host.save_pretrained(tmp_path / "host")
        host = AutoModel.from_pretrained(tmp_path / "host").eval()
        return make_model(family, host=host, router="static", **more)

    return make


def states_of(model, batch):
    with torch.no_grad():
        return model(**batch, output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_host_is_a_stock_model_that_computes_the_same(static, make_batch, tmp_path, family):
    model, batch = static(family), make_batch()
    plain = {name: tensor.clone() for name, tensor in model.host.state_dict().items()}
    before = states_of(model, batch)
    model.merge_and_save(tmp_path / "merged", tokenizer=tiny_tokenizer())
    stock = AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert type(stock).__module__.startswith("transformers.models.")
    after = states_of(stock, batch).hidden_states
    assert torch.allclose(after[-1], before.hidden_states[-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after[-1], model.host(**batch).last_hidden_state, atol=1e-2)  # not the host without it
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.host.state_dict().items())
    assert torch.allclose(head_by_hand(tmp_path / "merged", after, model), before.logits, atol=1e-3)


def head_by_hand(folder, states, model):
    from safetensors.torch import load_file

    head = load_file(folder / HEAD_NAME)
    logits = head["bias"].clone()
    for k, layer in enumerate(model.injection.knot_layers):
        scaled = states[layer] / states[layer].square().mean(dim=-1, keepdim=True).sqrt()
        logits = logits + scaled @ head["weight"][:, k].T
    return logits


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_what_the_readme_says_about_the_head_is_so(static, tmp_path, monkeypatch, kind):
    """Run the README's snippet; one sentence has no padding, so the snippet's mean over tokens is right."""
    more = {"cls": UniHyperLoraForSequenceClassification} if kind == "sequence" else {}
    model = static(**more)
    model.merge_and_save(tmp_path / "merged", tokenizer=tiny_tokenizer())
    [snippet] = re.findall(r"```python\n(.*?)```", (tmp_path / "merged" / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "merged")
    names: dict = {}
    exec(snippet, names)
    with torch.no_grad():
        expected = model(**{k: v for k, v in names["inputs"].items() if k != "token_type_ids"}).logits
    assert torch.allclose(names["logits"].detach().view_as(expected), expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_lora(static, make_batch, tmp_path, family):
    """At full rank the LoRA equals the model; at a low rank it has the stated error and differs from the host."""
    peft = pytest.importorskip("peft")
    model, batch = static(family), make_batch()
    expected = states_of(model, batch).hidden_states[-1]
    plain = states_of(AutoModel.from_pretrained(tmp_path / "host").eval(), batch).last_hidden_state
    off = {}
    for rank in (16, 2):
        errors = model.export_lora(tmp_path / f"r{rank}", rank)
        host = AutoModel.from_pretrained(tmp_path / "host").eval()
        lora = peft.PeftModel.from_pretrained(host, tmp_path / f"r{rank}").eval()
        weights = [m for m in lora.modules() if hasattr(m, "get_delta_weight")]
        assert len(weights) == len(model.injection.map.sites)
        off[rank] = (states_of(lora, batch).last_hidden_state - expected).abs().max()
        if rank == 16:  # as many atoms as there are
            assert errors["worst_relative_error"] < 1e-6 and off[rank] < 1e-4
        else:
            assert 0 < errors["relative_error"] <= errors["worst_relative_error"] < 1
            stated = json.loads((tmp_path / "r2" / "unihyperlora_export.json").read_text())
            assert stated["relative_error"] == errors["relative_error"]
            assert f"{errors['relative_error']:.2%}" in (tmp_path / "r2" / "README.md").read_text()
            difference = [
                m.get_delta_weight("default").double() - model.injection.delta_weight(site, "ner")
                for m, site in zip(weights, ordered(model, lora), strict=True)
            ]
            lost = sum(float(d.square().sum()) for d in difference) ** 0.5
            whole = sum(
                float(model.injection.delta_weight(s, "ner").square().sum()) for s in model.injection.map.sites
            )
            assert lost / whole**0.5 == pytest.approx(errors["relative_error"], rel=1e-3)
    assert off[2] > off[16] and (expected - plain).abs().max() > 10 * off[16]


def ordered(model, lora):
    """Sites in the order of PEFT's modules."""
    names = {name: module for name, module in model.host.named_modules()}
    sites = {id(site.linear): site for site in model.injection.map.sites}
    own = [name for name, module in lora.get_base_model().named_modules() if hasattr(module, "get_delta_weight")]
    return [sites[id(names[name])] for name in own]


def test_low_rank_is_the_nearest():
    torch.manual_seed(0)
    delta = torch.randn(6, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    down, up, gone, norm = low_rank(delta, 3)
    assert torch.allclose(up @ down, delta) and gone < 1e-10 and norm == pytest.approx(float(delta.norm()))
    down, up, gone, _ = low_rank(delta, 2)
    assert float((up @ down - delta).norm()) == pytest.approx(gone) and gone > 0.1


def test_what_is_not_fixed_is_refused(make_model, make_host, tmp_path):
    model = make_model()
    for export in (lambda: model.merge_and_save(tmp_path / "x"), lambda: model.export_lora(tmp_path / "x", 4)):
        with pytest.raises(MergeError, match="router='static'"):
            export()
    with pytest.raises(ExportError, match="router='static'"):
        model.export_onnx(tmp_path / "x.onnx")
    for rank in (0, 1000, 2.0, True):
        with pytest.raises(ExportError, match="rank="):
            make_model(router="static").export_lora(tmp_path / "x", rank)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_onnx_of_a_merged_update(static, make_batch, tmp_path, family):
    runtime = pytest.importorskip("onnxruntime")
    model = static(family)
    model.export_onnx(tmp_path / "model.onnx")
    assert not model.merged
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 7), (1, 4), (5, 12)):
        batch = make_batch(*shape)
        [found] = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        with torch.no_grad():
            expected = model(**batch).logits
        assert found.shape == (*shape, len(LABELS))
        real = batch["attention_mask"].bool()
        assert torch.allclose(torch.tensor(found)[real], expected[real], atol=1e-3)
