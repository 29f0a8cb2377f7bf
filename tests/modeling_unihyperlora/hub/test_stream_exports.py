"""A stream is no update of weights, but host and stream go into one ONNX file."""

import pytest
import torch

from modeling_unihyperlora import (
    CanonicalSpace,
    MergeError,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.publish.onnx_file import _StreamGraph
from tests.conftest import tiny_tokenizer
from tests.hub_server import client_environment, run_client
from tests.modeling_unihyperlora.families import tiny_host
from tests.modeling_unihyperlora.small_streams import stirred
from tests.tokenizer_kinds import KINDS, LINES, make_tokenizer

BATCHES = [
    ["anna lives in paris .", "carla"],
    ["the supercalifragilistic rome and oslo from lima"],
    [".", "a", "in a"],
]


def inputs_of(sentences):
    encoded = tiny_tokenizer()(sentences, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


@pytest.mark.parametrize("export", ["merge_and_save", "export_lora"])
def test_it_says_that_it_cannot_be_merged(make_adapter, tmp_path, export):
    rank = [4] if export == "export_lora" else []
    with pytest.raises(MergeError, match="no update of weights.*export_onnx"):
        getattr(make_adapter(), export)(tmp_path / "x", *rank)
    assert not (tmp_path / "x").exists()


def with_a_later_task(model):
    model.add_task("later", ["x", "y", "z"], reader={"width": 9, "hidden": 5}, bits=4)
    return stirred(model, "later").eval()


@pytest.mark.parametrize("later", [False, True], ids=["its task", "a task that came later"])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_what_is_exported_computes_the_same(make_adapter, kind, later):
    """Before ONNX: without packing, with as many places for words as tokens."""
    model = with_a_later_task(make_adapter(kind)) if later else make_adapter(kind)
    graph = _StreamGraph(model, model.config.active_task, kind == "sequence").eval()
    for sentences in BATCHES:
        ids, mask = inputs_of(sentences)
        with torch.no_grad():
            found, expected = graph(ids, mask), model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool() if kind == "token" else slice(None)
        assert torch.allclose(found[real], expected[real], atol=1e-4)
        assert expected[real].std() > 0.01


@pytest.mark.parametrize("cls", [UniHyperLoraForTokenClassification, UniHyperLoraForSequenceClassification])
@pytest.mark.parametrize("family", ["bert", "llama"], ids=["encoder", "decoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_reads_the_same_words(kind, family, cls, tmp_path):
    """With every kind of tokenizer, on an encoder and on a decoder, whose words are read at their last tokens."""
    tokenizer = make_tokenizer(kind)
    host = tiny_host(family, vocab_size=len(tokenizer) + 3, max_position_embeddings=128)
    (tmp_path / "anchors.txt").write_text("\n".join(LINES * 2), encoding="utf-8")
    space = CanonicalSpace.make([host], tmp_path / "anchors.txt", dim=8, atoms=16, tokenizers=[tokenizer])
    given = {"tokenizer": tokenizer, "space": space, "reader": {"width": 9, "hidden": 5}}
    model = stirred(cls.from_host(host, ["O", "B-PER", "I-PER"], "t", **given), "t").eval()
    assert model.stream.words.causal == (family == "llama")
    graph = _StreamGraph(model, "t", cls is UniHyperLoraForSequenceClassification).eval()
    prepared = model.stream.words.tokenizer
    for sentences in (LINES[:3], ["(Anna)", "3-2, or 5!"], ["Rome"]):
        encoded = prepared(list(sentences), padding=True, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        with torch.no_grad():
            found, expected = graph(ids, mask), model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool() if cls is UniHyperLoraForTokenClassification else slice(None)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)
        assert expected[real].std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "later"), [("token", False), ("token", True), ("sequence", False)])
def test_onnx(make_adapter, tmp_path, kind, later):
    runtime = pytest.importorskip("onnxruntime")
    model = with_a_later_task(make_adapter(kind)) if later else make_adapter(kind)
    model.save_pretrained(tmp_path / "adapter")
    code = f"""
from modeling_unihyperlora import UniHyperLoraForSequenceClassification, UniHyperLoraForTokenClassification
model = {type(model).__name__}.from_pretrained({str(tmp_path / "adapter")!r})
model.export_onnx({str(tmp_path / "model.onnx")!r})
result = True
"""
    run_client(code, client_environment("http://127.0.0.1:9", tmp_path / "home"), offline=True)  # as exporting wants
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for sentences in BATCHES:
        ids, mask = inputs_of(sentences)
        [found] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool() if kind == "token" else slice(None)
        assert torch.allclose(torch.tensor(found)[real], expected[real], atol=1e-4)
