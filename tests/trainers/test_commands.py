"""The command ``unihyperlora``: its help, its errors, and that its subcommands equal the scripts."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.commands import COMMANDS, main


def test_help_names_every_subcommand(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS) and len(printed.splitlines()) < 24


def test_without_a_subcommand_the_help_is_the_answer(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: unihyperlora")


def test_an_unknown_subcommand_is_refused(capsys):
    assert main(["tagg"]) == 2
    said = capsys.readouterr().err
    assert "'tagg'" in said and "inspect" in said and "Traceback" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"trainers.commands.{COMMANDS[name][0]}")
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and printed.startswith("usage: ")
    assert len(printed.splitlines()) <= 24 and max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize("name", ["ner", "classification"])
def test_the_common_flags_are_flags_with_these_defaults(name, capsys):
    module = importlib.import_module(f"trainers.commands.{name}")
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as left:
            module.main([flag])
        assert left.value.code == 0
        texts[flag] = capsys.readouterr().out
    flags = set(re.findall(r"--\w+", texts["--help"])) - {"--help"}
    assert len(flags) > 15 and not [flag for flag in flags if f"{flag} " not in texts["--help-all"]]
    stated = dict(re.findall(r"(--\w+) N {2,}(?:\w.*; )?(\d+) by default", texts["--help"]))
    assert set(stated) == {"--per_device_train_batch_size", "--max_seq_length", "--seed"}
    for flag, value in stated.items():
        described = texts["--help-all"].split(f"\n  {flag} ")[1].split("\n  --")[0]
        assert f"(default: {value})" in " ".join(described.split())


def test_what_a_user_gave_wrong_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("unihyperlora inspect: ") and str(tmp_path / "nothing") in said


def test_the_installed_command():
    command = Path(sys.executable).with_name("unihyperlora")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("unihyperlora 0.")
