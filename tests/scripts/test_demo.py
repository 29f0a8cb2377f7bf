"""The demo's own functions; its training is tested with run_ner."""

import hashlib
import sys
from pathlib import Path

import pytest
from rich.console import Console

from modeling_unihyperlora import DataError
from scripts import demo
from trainers.arguments import NerArguments, check_arguments, parse
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


def test_the_table_has_every_figure():
    results = {"eval_f1": 0.4567, "adapter_bytes": 613_120, "bytes_of_space": 451_700, "reader_bytes": 101_240}
    results |= {"head_bytes": 5_460, "delta_bytes": 512, "flops_overhead_pct": 3.36, "extra_ram_mb": 2.62}
    results |= {"host_cpu_seconds": 41.2, "train_runtime": 99.6}
    figures = (
        "0.457",
        "613,120 B",
        "451,700 B",
        "101,240 B",
        "5,460 B",
        "512 B",
        "3.36 %",
        "2.62 MB",
        "41 CPU s",
        "100 s",
    )
    assert not [figure for figure in figures if figure not in shown(demo.table_of(results))]


def test_the_transfer_table_has_the_controls():
    scores = [{"eval_f1": 0.51}, {"zero_shot_f1": 0.42}, {"eval_f1": 0.33}, {"zero_shot_f1": 0.04}]
    table = shown(demo.transfer_table(*scores))
    assert [line.split("│")[-2].strip() for line in table.splitlines() if "│" in line] == [
        "0.510",
        "0.420",
        "0.330",
        "0.040",
    ]


def test_what_to_type_next_can_be_typed(tmp_path):
    text = demo.next_steps(tmp_path / "demo", "a/host", "another/host")
    assert f"The adapter is the folder {tmp_path / 'demo'}" in text
    commands = [line.split() for line in text.replace("\\\n", "").splitlines() if "scripts/run_ner.py" in line]
    assert len(commands) == 2
    for _, script, *flags in commands:
        assert (Path(__file__).parents[2] / script).is_file()
        check_arguments(*parse([*flags, "--use_cpu"], NerArguments))
    assert f"-m trainers.commands inspect {tmp_path / 'demo'} --host another/host" in text


def test_sentences_to_tag(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert list(demo.sentences_to_tag("Hello Rome")) == ["Hello Rome"]
    assert list(demo.sentences_to_tag(None)) == [demo.DEFAULT_SENTENCE]
    typed = iter(["one", "two", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert list(demo.sentences_to_tag(None)) == ["one", "two"]
