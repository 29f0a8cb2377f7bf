"""make_space writes a readable space and its origin, and refuses bad input."""

import json

import pytest

from modeling_unihyperlora import CanonicalSpace, ConfigError, HostError
from modeling_unihyperlora.hosts import describe_host, load_host
from scripts.research import make_space
from tests.conftest import WORDS


@pytest.fixture
def command(tiny_host, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "anchors.txt").write_text("\n".join(" ".join(WORDS[n % 9 :]) for n in range(40)))
    flags = ["--hosts", tiny_host, "--anchor_file", tmp_path / "anchors.txt", "--dim", 6, "--name", "tiny"]
    return [*map(str, flags), "--version", "3", "--output", str(tmp_path / "space.safetensors")]


def test_a_space_and_what_it_was_made_from(command, tiny_host, tmp_path, capsys):
    make_space.main(command)
    space = CanonicalSpace.load(tmp_path / "space.safetensors")
    origin = json.loads((tmp_path / "space.safetensors.json").read_text())
    assert (space.name, space.version, space.shape()["dim"]) == ("tiny", 3, 6)
    assert origin["hosts"] == [describe_host(load_host(str(tiny_host)), tiny_host.name, 2)]
    assert origin["digest"] == space.digest and str(tmp_path) not in json.dumps(origin)
    said = capsys.readouterr().out
    assert f"space tiny 3 ({space.digest})" in said and f"made from {tiny_host.name}" in said


def test_the_same_hosts_and_text_make_the_same_space(command, tmp_path):
    make_space.main(command)
    first = CanonicalSpace.load(tmp_path / "space.safetensors").digest
    make_space.main(command)
    assert CanonicalSpace.load(tmp_path / "space.safetensors").digest == first


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        (["--dim", "0"], ConfigError, "--dim 0 is too small"),
        (["--version", "0"], ConfigError, "--version 0 is too small"),
        (["--dim", "65"], HostError, "65 canonical coordinates need"),
        (["--hosts", "no/such-host"], HostError, "no/such-host"),
        (["--anchor_file", "none.txt"], Exception, "none.txt"),
    ],
)
def test_what_is_refused_writes_nothing(command, tmp_path, flags, error, expected):
    with pytest.raises(error, match=expected):
        make_space.main([*command, *flags])
    assert not list(tmp_path.glob("space.safetensors*"))
