"""A stream cannot be merged, but host and stream export to one ONNX file or to two."""

import json
import math

import pytest
import torch

from modeling_unihyperlora import (
    CanonicalSpace,
    ExportError,
    MergeError,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.publish.onnx_file import OPSET, export_onnx, host_metadata, reader_metadata, tokenizer_text
from modeling_unihyperlora.publish.onnx_graphs import HostGraph, reader_model
from tests.conftest import tiny_tokenizer
from tests.hub_server import client_environment, run_client
from tests.modeling_unihyperlora.families import tiny_host
from tests.modeling_unihyperlora.small_streams import stirred
from tests.tokenizer_kinds import KINDS, LINES, make_tokenizer

onnxruntime = pytest.importorskip("onnxruntime")

BATCHES = [
    ["anna lives in paris .", "carla"],
    ["the supercalifragilistic rome and oslo from lima"],
    [".", "a", "in a"],
]


def inputs_of(sentences):
    encoded = tiny_tokenizer()(sentences, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def host_states(model, ids, mask):
    """Outputs of the host's file by name, computed with torch, which is faster than exporting."""
    with torch.no_grad():
        return dict(zip(HostGraph.OUTPUTS, HostGraph(model).eval()(ids, mask), strict=True))


def read_by(reader, states):
    """The logits of a reader's file."""
    session = onnxruntime.InferenceSession(reader.SerializeToString())
    [logits] = session.run(None, {given.name: states[given.name].numpy() for given in session.get_inputs()})
    return torch.tensor(logits)


@pytest.mark.parametrize("export", ["merge_and_save", "export_lora"])
def test_it_says_that_it_cannot_be_merged(make_adapter, tmp_path, export):
    rank = [4] if export == "export_lora" else []
    with pytest.raises(MergeError, match="does not update weights.*export_onnx"):
        getattr(make_adapter(), export)(tmp_path / "x", *rank)
    assert not (tmp_path / "x").exists()


def with_a_later_task(model):
    model.add_task("later", ["x", "y", "z"], reader={"width": 9, "hidden": 5}, bits=4)
    return stirred(model, "later").eval()


@pytest.mark.parametrize("worth", [-math.inf, math.inf], ids=["landmarks", "a linear map"])
@pytest.mark.parametrize("later", [False, True], ids=["its task", "a task that came later"])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_what_is_exported_computes_the_same(make_adapter, kind, later, worth, tmp_path, monkeypatch):
    """The exported graph has as many word positions as tokens."""
    monkeypatch.setattr("modeling_unihyperlora.space.WORTH", worth)
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path))
    model = with_a_later_task(make_adapter(kind)) if later else make_adapter(kind)
    model.calibrate(tiny_tokenizer())
    assert (model.stream.fit.landmarks is None) == (worth > 0)
    reader = reader_model(model, model.config.active_task, OPSET)
    for sentences in BATCHES:
        ids, mask = inputs_of(sentences)
        found = read_by(reader, host_states(model, ids, mask))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool() if kind == "token" else slice(None)
        assert torch.allclose(found[real], expected[real], atol=1e-4)
        assert expected[real].std() > 0.01


@pytest.mark.parametrize("cls", [UniHyperLoraForTokenClassification, UniHyperLoraForSequenceClassification])
@pytest.mark.parametrize("family", ["bert", "llama"], ids=["encoder", "decoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_reads_the_same_words(kind, family, cls, tmp_path):
    """For every kind of tokenizer, on an encoder and on a decoder, which reads a word at its last token."""
    torch.manual_seed(1)  # some random hosts give three classes nearly equal scores
    tokenizer = make_tokenizer(kind)
    host = tiny_host(family, vocab_size=len(tokenizer) + 3, max_position_embeddings=128)
    (tmp_path / "anchors.txt").write_text("\n".join(LINES * 2), encoding="utf-8")
    space = CanonicalSpace.make([host], tmp_path / "anchors.txt", dim=8, atoms=16, tokenizers=[tokenizer])
    given = {"tokenizer": tokenizer, "space": space, "reader": {"width": 9, "hidden": 5}}
    model = stirred(cls.from_host(host, ["O", "B-PER", "I-PER"], "t", **given), "t").eval()
    assert model.stream.words.causal == (family == "llama")
    reader = reader_model(model, "t", OPSET)
    prepared = model.stream.words.tokenizer
    for sentences in (LINES[:3], ["(Anna)", "3-2, or 5!"], ["Rome"]):
        encoded = prepared(list(sentences), padding=True, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        found = read_by(reader, host_states(model, ids, mask))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool() if cls is UniHyperLoraForTokenClassification else slice(None)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)
        assert expected[real].std() > 0.01


@pytest.mark.parametrize("tuned", [False, True], ids=["δθ is zero", "δθ is tuned"])
def test_a_reader_of_each_host_has_small_matrices(make_adapter, tuned):
    """If δθ is not zero, the first matrix is float32; the file grows by nothing else."""
    model = make_adapter()
    task = model.config.active_task
    model.add_task("big", ["O", "B-X", "I-X"], reader="large")
    stirred(model, "big").eval()
    if not tuned:
        model.adapter.tasks["big"].delta.latent.data.zero_()
    bytes_of = {name: reader_model(model, name, OPSET).ByteSize() for name in ("big", task)}
    shapes = [t.latent.numel() for t in (model.adapter.tasks["big"].reader.inward,)]
    matrices = sum(p.numel() for n, p in model.adapter.tasks["big"].named_parameters() if "delta" not in n)
    assert matrices < bytes_of["big"] < matrices + 4 * shapes[0] * tuned + 20_000 < 1_000_000


def test_what_the_files_say(make_adapter):
    model = make_adapter()
    task = model.config.active_task
    host = host_metadata(model, tokenizer_text(model.stream.words.tokenizer))
    tuned = reader_metadata(model, task)
    model.adapter.tasks[task].delta.latent.data.zero_()
    reader = reader_metadata(model, task)
    assert tuned["map"] == host["map"] and reader["map"] is None
    assert (host["kind"], reader["kind"]) == ("host", "reader")
    for name in ("format", "space", "space_name", "host", "fingerprint"):
        assert host[name] == reader[name]
    assert reader["labels"] == model.labels and reader["type"] == "token_classification"
    assert host["window"] == 64


def test_the_tokenizer_beside_the_host_pads_and_cuts_nothing_off(make_adapter):
    prepared = make_adapter().stream.words.tokenizer
    prepared(["a b c d e f"] * 2, truncation=True, max_length=4, padding="max_length")
    written = json.loads(tokenizer_text(prepared))
    assert written["truncation"] is None and written["padding"]["pad_id"] == prepared.pad_token_id
    assert written["normalizer"] == json.loads(prepared.backend_tokenizer.to_str())["normalizer"]


def test_an_injected_update_is_in_one_file(make_adapter, tmp_path):
    model = make_adapter(pathway="inject")
    with pytest.raises(ExportError, match="one file"):
        export_onnx(model, tmp_path / "reader.onnx", tmp_path / "host.onnx")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "later"), [("token", False), ("token", True), ("sequence", False)])
def test_onnx(make_adapter, tmp_path, kind, later):
    """One file and two files give torch's outputs, and the host's file also serves a task of another export.

    Each export runs in its own process, as torch's exporter requires.
    """
    model = with_a_later_task(make_adapter(kind)) if later else make_adapter(kind)
    model.save_pretrained(tmp_path / "adapter")
    for given in (["model.onnx"], ["reader.onnx", "host.onnx"]):
        code = f"""
from modeling_unihyperlora import UniHyperLoraForSequenceClassification, UniHyperLoraForTokenClassification
model = {type(model).__name__}.from_pretrained({str(tmp_path / "adapter")!r})
model.export_onnx(*{[str(tmp_path / name) for name in given]})
result = True
"""
        run_client(code, client_environment("http://127.0.0.1:9", tmp_path / "home"), offline=True)
    one, host, reader = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("model", "host", "reader")
    )
    for sentences in BATCHES:
        ids, mask = inputs_of(sentences)
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        [found] = one.run(None, given)
        states = dict(zip(HostGraph.OUTPUTS, host.run(None, given), strict=True))
        [apart] = reader.run(None, {name.name: states[name.name] for name in reader.get_inputs()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool() if kind == "token" else slice(None)
        assert torch.allclose(torch.tensor(found)[real], expected[real], atol=1e-4)
        assert torch.allclose(torch.tensor(apart)[real], torch.tensor(found)[real], atol=1e-6)
