"""The demo's own functions; its training is tested with run_ner."""

import hashlib
import re
import sys

import pytest
from rich.console import Console

from modeling_unihyperlora import DataError
from scripts import demo
from trainers.arguments import NerArguments, check_arguments, parse
from trainers.findings import Entity, TaggedText
from trainers.ner_data import Sentence, read_file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package whose code must not run; returns its folder and the checksum of its only file."""
    folder = tmp_path / "pretend_package"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "a.txt").write_bytes(b"content")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder, {"data/a.txt": hashlib.sha256(b"content").hexdigest()}


def test_a_verified_package_is_found_and_not_imported(package):
    folder, sums = package
    assert demo.verified("pretend_package", sums) == folder
    assert "pretend_package" not in sys.modules


def test_a_changed_file_is_refused(package):
    folder, sums = package
    (folder / "data" / "a.txt").write_bytes(b"Content")
    with pytest.raises(DataError, match=f"a.txt is not the file .* expected {sums['data/a.txt']}"):
        demo.verified("pretend_package", sums)


def test_a_missing_file_is_refused(package):
    folder, sums = package
    (folder / "data" / "a.txt").unlink()
    with pytest.raises(DataError, match="a.txt is missing"):
        demo.verified("pretend_package", sums)


def test_a_missing_package_is_refused():
    with pytest.raises(DataError, match="no_such_package is not installed"):
        demo.verified("no_such_package", {})


def test_the_parts_are_fixed_and_apart(tmp_path):
    tweets = [Sentence([f"word{number // 2}"], ["O"], "") for number in range(400)]  # each tweet twice
    train, held_out = (read_file(path) for path in demo.write_parts(tweets, tmp_path / "a"))
    assert len(train) + len(held_out) == 400
    assert 40 < len(held_out) < 120
    words = [{sentence.tokens[0] for sentence in part} for part in (train, held_out)]
    assert not words[0] & words[1]
    _, again = demo.write_parts(tweets[::-1], tmp_path / "b")
    assert sorted(s.tokens for s in read_file(again)) == sorted(s.tokens for s in held_out)


def shown(table) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_size_table_has_every_figure():
    results = {"adapter_bytes": 613_120, "bytes_of_space": 451_700, "reader_bytes": 101_240}
    results |= {"head_bytes": 5_460, "delta_bytes": 512, "flops_overhead_pct": 3.36}
    text = shown(demo.size_table(results))
    figures = ("613,120", "451,700", "101,240", "5,460", "512", "3.4 %")
    assert not [figure for figure in figures if figure not in text]


def test_the_transfer_table_has_the_scores_in_order():
    table = shown(demo.transfer_table({"eval_f1": 0.51}, {"zero_shot_f1": 0.42}, {"eval_f1": 0.33}))
    assert re.findall(r"0\.\d{3}", table) == ["0.510", "0.420", "0.330"]


def test_texts_stand_side_by_side():
    found = [TaggedText("Ada flew.", ["Ada", "flew", "."], ["B-PER", "O", "O"], [Entity("Ada", "PER", 0, 3, 1.0)])]
    [line] = [line for line in shown(demo.side_by_side({"a": found, "b": found})).splitlines() if "Ada" in line]
    assert line.count("Ada [PER] flew.") == 2


def test_what_to_type_next_can_be_typed(tmp_path):
    text = demo.next_steps(tmp_path / "demo", "a/host", "another/host")
    assert f"The adapter is the folder {tmp_path / 'demo'}" in text
    commands = [line.split() for line in text.replace("\\\n", "").splitlines() if " ner " in line]
    assert len(commands) == 2
    for _, *module, command, flag, adapter in [line[:6] for line in commands]:
        assert (module, command, flag) == (["-m", "trainers.commands"], "ner", "--adapter")
        assert adapter == str(tmp_path / "demo")
    for line in commands:
        check_arguments(*parse([*line[4:], "--use_cpu"], NerArguments))
    assert f"-m trainers.commands inspect {tmp_path / 'demo'} --host another/host" in text


def test_sentences_are_typed_at_a_terminal_alone(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert list(demo.typed_sentences()) == []
    typed = iter(["one", "two", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert list(demo.typed_sentences()) == ["one", "two"]
