"""Two ONNX files give the torch model's tags and classes without torch; mismatched files are refused.

In quick tests a session that computes the host with torch stands in for the host's file, which takes torch's exporter
half a minute to write.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from modeling_unihyperlora import UniHyperLoraForSequenceClassification
from modeling_unihyperlora.publish import onnx_file
from modeling_unihyperlora.publish.onnx_graphs import HostGraph, reader_model
from modeling_unihyperlora.words import NO_WORD
from tests.hub_server import client_environment, run_client
from tests.modeling_unihyperlora.small_streams import MOODS, TOKENIZER, bert, small_space, small_stream, text
from trainers import onnx_runtime, windows
from trainers.commands import main
from trainers.onnx_runtime import OnnxFileError, OnnxReader
from trainers.tagging import classify, tag

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = ["word1 word2, unknown word3", "", "word7", " ".join(sum(text(2, 30), [])), "(word5) 7! word6"]


class TorchSession:
    """Replaces the session of a host's file: runs the host with torch."""

    def __init__(self, model):
        self.graph = HostGraph(model).eval()

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in HostGraph.OUTPUTS]

    @torch.no_grad()
    def run(self, _, given):
        made = self.graph(*(torch.tensor(given[name]) for name in ("input_ids", "attention_mask")))
        return [part.numpy() for part in made]


def write_pair(model, folder, **changes):
    """Write the reader's file, the tokenizer, and a host's file with valid metadata that computes nothing."""
    tokenizer = onnx_file.tokenizer_text(model.stream.words.tokenizer)
    said = onnx_file.host_metadata(model, tokenizer) | changes
    value = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "tokens"])
    same = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.INT64, ["batch", "tokens"])
    node = onnx.helper.make_node("Identity", ["input_ids"], ["same"])
    graph = onnx.helper.make_graph([node], "host", [value], [same])
    opset = onnx.helper.make_opsetid("", changes.get("opset", onnx_file.OPSET))
    host = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    task = model.config.active_task
    reader = reader_model(model, task, onnx_file.OPSET)
    onnx_file._describe(host, said)
    onnx_file._describe(reader, onnx_file.reader_metadata(model, task))
    onnx.save(host, folder / "host.onnx")
    onnx.save(reader, folder / "reader.onnx")
    (folder / "host.tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return folder / "host.onnx", folder / "reader.onnx"


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A function that opens a model's reader file with a host that torch computes."""

    def made(model):
        opened = onnx_runtime._opened

        def open_here(path, kind):
            session, said = opened(path, kind)
            return (TorchSession(model) if kind == "host" else session), said

        monkeypatch.setattr(onnx_runtime, "_opened", open_here)
        return OnnxReader(*write_pair(model, tmp_path))

    return made


def tagger(**given):
    model = small_stream(labels=LABELS, **given)
    model.config.tasks["people"]["scheme"] = "IOB2"
    return model


@pytest.mark.parametrize("size", [128, 20])
def test_it_tags_as_torch_does(pair, size):
    """Also texts longer than the host's window, a text without words, and unknown words."""
    model = tagger()
    found = pair(model).tag(TEXTS, max_seq_length=size, batch_size=2)
    expected = tag(model, TEXTS, max_seq_length=size, batch_size=3)
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.words, one.tags) == (other.text, other.words, other.tags)
        for entity, same in zip(one.entities, other.entities, strict=True):
            assert (entity.text, entity.type, entity.start, entity.end) == (
                same.text,
                same.type,
                same.start,
                same.end,
            )
            assert entity.score == pytest.approx(same.score, abs=1e-4)
    assert len({*sum((one.tags for one in found), [])}) > 2


def test_it_classifies_as_torch_does(pair):
    model = small_stream(labels=MOODS, task="moods", cls=UniHyperLoraForSequenceClassification)
    texts = [one for one in TEXTS if one]
    reader = pair(model)
    for size in (128, 7):
        found = reader.classify(texts, max_seq_length=size)
        for one, other in zip(found, classify(model, texts, max_seq_length=size), strict=True):
            assert one.label == other.label and one.scores == pytest.approx(other.scores, abs=1e-4)
    with pytest.raises(OnnxFileError, match="Text 2 of 2 is empty"):
        reader.classify(["word1", " "])
    with pytest.raises(OnnxFileError, match="is sequence_classification, but token_classification was asked for"):
        reader.tag(["word1"])


def test_what_does_not_fit_is_refused(pair):
    reader = pair(tagger())
    with pytest.raises(OnnxFileError, match="leaves no room"):
        reader.tag(["word1"], max_seq_length=2)
    with pytest.raises(OnnxFileError, match="read raw text"):
        reader.tag([["word1"]])


def test_a_reader_without_delta_reads_any_host(tmp_path):
    one, other = tagger(), tagger(host=bert(24, 3, seed=4))
    host, _ = write_pair(other, tmp_path)
    one.adapter.tasks["people"].delta.latent.data.zero_()
    (tmp_path / "one").mkdir()
    _, reader = write_pair(one, tmp_path / "one")
    assert OnnxReader(host, reader).labels == LABELS


def test_another_hosts_reader_is_refused(tmp_path):
    (tmp_path / "one").mkdir()
    host, _ = write_pair(tagger(host=bert(24, 3, seed=4)), tmp_path)
    _, reader = write_pair(tagger(), tmp_path / "one")
    with pytest.raises(OnnxFileError, match=r"was tuned \(δθ\) on the host 'BertModel' \(.*Give that host's file"):
        OnnxReader(host, reader)


def test_a_stale_pair_is_refused(tmp_path):
    files = write_pair(tagger(), tmp_path, map="0123456789abcdef")
    with pytest.raises(OnnxFileError, match="the map 0123456789abcdef: one of the two is older. Write both again"):
        OnnxReader(*files)


def test_another_space_is_refused(tmp_path):
    (tmp_path / "one").mkdir()
    host, _ = write_pair(tagger(), tmp_path)
    _, reader = write_pair(tagger(space=small_space(seed=6)), tmp_path / "one")
    with pytest.raises(OnnxFileError, match="reads the space 'own 1'.*their coordinates mean different things"):
        OnnxReader(host, reader)


def test_files_that_cannot_be_used_are_refused(tmp_path):
    host, reader = write_pair(tagger(), tmp_path, opset=999)
    with pytest.raises(OnnxFileError, match="cannot be run by onnxruntime .*Opset 999.*pip install -U onnxruntime"):
        OnnxReader(host, reader)
    unknown = onnx.load(host)
    unknown.opset_import[0].version = onnx_file.OPSET
    unknown.opset_import.append(onnx.helper.make_opsetid("org.example", 1))
    unknown.graph.node[0].domain = "org.example"
    onnx.save(unknown, host)
    with pytest.raises(OnnxFileError, match="cannot be run by onnxruntime .*org.example.*pip install -U onnxruntime"):
        OnnxReader(host, reader)
    host, reader = write_pair(tagger(), tmp_path, format="99")
    with pytest.raises(OnnxFileError, match="has format '99', but this version of unihyperlora reads '1'"):
        OnnxReader(host, reader)
    host, reader = write_pair(tagger(), tmp_path)
    with pytest.raises(OnnxFileError, match="is the file of a host; a reader's file is needed"):
        OnnxReader(host, host)
    with pytest.raises(OnnxFileError, match="There is no file"):
        OnnxReader(host, tmp_path / "none.onnx")
    (tmp_path / "host.tokenizer.json").write_text(TOKENIZER.backend_tokenizer.to_str())
    with pytest.raises(OnnxFileError, match="is not the tokenizer that"):
        OnnxReader(host, reader)
    (tmp_path / "host.tokenizer.json").unlink()
    with pytest.raises(OnnxFileError, match="Put it beside"):
        OnnxReader(host, reader)
    for content in (b"", b"no ONNX", reader.read_bytes()[:2000]):
        (tmp_path / "damaged.onnx").write_bytes(content)
        with pytest.raises(OnnxFileError, match="cannot be run|is not a file of a host or a reader"):
            OnnxReader(host, tmp_path / "damaged.onnx")


def test_the_command_says_what_is_missing(tmp_path, capsys):
    host, reader = write_pair(tagger(), tmp_path)
    assert main(["tag", str(reader), "word1", "--runtime", "onnx"]) == 1
    assert capsys.readouterr().err == "unihyperlora tag: --runtime onnx also needs the host's file: --host host.onnx\n"
    given = ["tag", str(reader), "word1", "--runtime", "onnx", "--host", str(host), "--task", "people"]
    assert main(given) == 1 and "Leave --task out" in capsys.readouterr().err


def test_both_sides_know_the_same_format():
    assert (onnx_runtime.FORMAT, onnx_runtime.KEY) == (onnx_file.FORMAT, onnx_file.KEY)
    assert windows.NO_WORD == NO_WORD


WITHOUT_TORCH = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "sklearn", "modeling_unihyperlora"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Forbidden())
from trainers.commands import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(*typed: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, typed)], capture_output=True, text=True)


def test_the_runtime_needs_no_torch(tmp_path):
    """The host's file computes nothing here, so reading a text fails when the runtime asks for states."""
    host, reader = write_pair(tagger(), tmp_path, format="99")
    done = without_torch("tag", reader, "word1 word2", "--runtime", "onnx", "--host", host)
    assert done.returncode == 1 and done.stderr.startswith(f"unihyperlora tag: {host} has format '99'")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tag", "classify"])
def test_exported_files_give_what_torch_gives(tmp_path, kind):
    """The command line from export to output; the second half without torch."""
    texts = [one for one in TEXTS if one]
    bert().save_pretrained(tmp_path / "host")
    TOKENIZER.save_pretrained(tmp_path / "host")
    given = {"labels": MOODS, "task": "moods", "cls": UniHyperLoraForSequenceClassification}
    model = tagger() if kind == "tag" else small_stream(**given)
    model.config.base_model_name_or_path = str(tmp_path / "host")
    model.save_pretrained(tmp_path / "adapter")
    typed = ["export-onnx", tmp_path / "adapter", tmp_path / "reader.onnx", "--host_file", tmp_path / "host.onnx"]
    code = f"from trainers.commands import main\nresult = main({[*map(str, typed)]})"
    assert run_client(code, client_environment("http://127.0.0.1:9", tmp_path / "home"), offline=True) == 0
    options = ["--json", "--runtime", "onnx", "--host", tmp_path / "host.onnx"]
    done = without_torch(kind, tmp_path / "reader.onnx", *texts, *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if kind == "tag":
        found = [[(e["text"], e["type"], e["start"], e["end"]) for e in row["entities"]] for row in rows]
        expected = tag(model, texts)
        assert found == [[(e.text, e.type, e.start, e.end) for e in one.entities] for one in expected]
        assert any(found)
    else:
        assert [row["label"] for row in rows] == [one.label for one in classify(model, texts)]
