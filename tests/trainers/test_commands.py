"""The command ``unihyperlora``: its help, what it refuses, and that its subcommands are what the scripts run."""

import importlib
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
    if name in ("tag", "classify"):
        assert len(printed.splitlines()) <= 24


def test_what_a_user_gave_wrong_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("unihyperlora inspect: ") and str(tmp_path / "nothing") in said


def test_the_installed_command():
    command = Path(sys.executable).with_name("unihyperlora")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("unihyperlora 0.")
