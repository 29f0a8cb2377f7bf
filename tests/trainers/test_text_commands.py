"""``unihyperlora tag`` and ``classify``: their input, their output, and their errors."""

import io
import json
import subprocess
import sys

import pytest

from modeling_unihyperlora import UniHyperLoraForSequenceClassification
from tests.modeling_unihyperlora.small_streams import LABELS, MOODS, TOKENIZER, bert, small_stream
from trainers.commands import main
from trainers.tagging import classify, tag

TEXTS = ["word1 word2 word3", "word4, word5 word6", "word7 word8 word9 word1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a host, a tagger and a classifier, and the two models."""
    folder = tmp_path_factory.mktemp("saved")
    bert().save_pretrained(folder / "host")
    TOKENIZER.save_pretrained(folder / "host")
    tagger = small_stream(labels=LABELS)
    classifier = small_stream(labels=MOODS, task="moods", cls=UniHyperLoraForSequenceClassification)
    for name, model in (("tagger", tagger), ("classifier", classifier)):
        model.config.base_model_name_or_path = str(folder / "host")
        model.save_pretrained(folder / name)
    return folder, tagger, classifier


def printed(capsys, *command: object) -> list[str]:
    assert main([*map(str, command)]) == 0
    return capsys.readouterr().out.splitlines()


def test_texts_as_json(saved, capsys):
    folder, tagger, _ = saved
    rows = [json.loads(line) for line in printed(capsys, "tag", folder / "tagger", *TEXTS, "--json")]
    assert [row["text"] for row in rows] == TEXTS
    for row, found in zip(rows, tag(tagger, TEXTS), strict=True):
        assert [(e["text"], e["type"], e["start"], e["end"]) for e in row["entities"]] == [
            (e.text, e.type, e.start, e.end) for e in found.entities
        ]
        assert [e["score"] for e in row["entities"]] == pytest.approx([e.score for e in found.entities], abs=1e-3)
    assert any(row["entities"] for row in rows)


def test_entities_are_marked_in_the_text(saved, capsys):
    folder, tagger, _ = saved
    lines = printed(capsys, "tag", folder / "tagger", *TEXTS, "--host", folder / "host")
    for line, found in zip(lines, tag(tagger, TEXTS), strict=True):
        assert line.count("[PER]") == len(found.entities) and line.replace(" [PER]", "") == found.text


def test_files_and_standard_input_give_what_arguments_give(saved, capsys, tmp_path, monkeypatch):
    folder, *_ = saved
    own = ["tag", folder / "tagger", "--json", "--batch_size", 2]
    expected = printed(capsys, *own, *TEXTS)
    (tmp_path / "plain.txt").write_text("\n".join([TEXTS[0], "", *TEXTS[1:]]))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    words = [one.replace(",", " ,").split() for one in TEXTS]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"tokens": one}) + "\n" for one in words))
    assert printed(capsys, *own, tmp_path / "plain.txt") == expected
    assert printed(capsys, *own, tmp_path / "rows.jsonl") == expected
    of_words = [json.loads(line)["text"] for line in printed(capsys, *own, tmp_path / "words.jsonl")]
    assert of_words == [" ".join(one) for one in words]
    for dash in (["-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS) + "\n\n"))
        assert printed(capsys, *own, *dash) == expected
    assert printed(capsys, *own, TEXTS[0], tmp_path / "plain.txt", TEXTS[1]) == [
        expected[0],
        *expected,
        expected[1],
    ]


def test_classes(saved, capsys, tmp_path):
    folder, _, classifier = saved
    found = classify(classifier, TEXTS)
    rows = [json.loads(line) for line in printed(capsys, "classify", folder / "classifier", *TEXTS, "--json")]
    assert [(row["text"], row["label"]) for row in rows] == [(one.text, one.label) for one in found]
    assert all(row["scores"] == pytest.approx(one.scores, abs=1e-3) for row, one in zip(rows, found, strict=True))
    lines = printed(capsys, "classify", folder / "classifier", *TEXTS)
    assert lines == [f"{one.label} {one.score:.2f}  {one.text}" for one in found]
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2\nword1,word2\n")
    [pair] = printed(capsys, "classify", folder / "classifier", tmp_path / "pairs.csv")
    assert pair.startswith(tuple(MOODS)) and pair.endswith("word1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows.jsonl": '{"words": ["a"]}'}, 'line 1: each line needs "text"'),
        ({"rows.jsonl": "[]"}, "not an object"),
        ({"rows.txt": b"\xff"}, "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(saved, capsys, tmp_path, given, said):
    [(name, content)] = given.items()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["tag", str(saved[0] / "tagger"), str(tmp_path / name)]) == 1
    found = capsys.readouterr().err
    assert said in found and found.startswith("unihyperlora tag: ") and "Traceback" not in found


def test_the_other_kind_of_adapter_is_refused(saved, capsys):
    assert main(["tag", str(saved[0] / "classifier"), "word1"]) == 1
    assert "Task 'moods' is sequence_classification" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tag", str(saved[0] / "tagger"), "word1", "--batch_size", "0"])
    assert "not a whole number above 0" in capsys.readouterr().err


def test_the_command_itself_needs_no_torch():
    code = "import sys, trainers.commands.tag as t; sys.exit('torch' in sys.modules or t.__name__ == '')"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tagging_imports_nothing_for_training():
    code = "import sys, trainers.tagging, trainers.commands.inspect; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {*run.stdout.split()}
    assert "torch" in loaded and not loaded & {"sklearn", "pandas", "datasets", "peft", "seqeval"}
