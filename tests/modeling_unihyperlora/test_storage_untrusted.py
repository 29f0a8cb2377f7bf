"""Malicious files from others."""

import json
import shutil

import pytest

from modeling_unihyperlora import AdapterFileError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_WEIGHTS_BYTES


@pytest.fixture
def folder(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, host, **more):
    return UniHyperLoraForTokenClassification.from_pretrained(folder, host=host, **more)


def header_of(path) -> tuple[str, bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + size].decode(), raw[8 + size :]


def write(path, header: str, rest: bytes) -> None:
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + rest)


def test_a_key_written_twice_in_the_configuration(folder, make_host):
    path = folder / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "atoms": 16}')
    with pytest.raises(AdapterFileError, match="'atoms' appears twice"):
        load(folder, make_host())


def test_a_tensor_named_twice_in_the_header(folder, make_host):
    path = folder / "model.safetensors"
    header, rest = header_of(path)
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    write(path, header.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}", rest)
    with pytest.raises(AdapterFileError, match="appears twice"):
        load(folder, make_host())


def test_an_oversized_header_is_not_read(folder, make_host):
    path = folder / "model.safetensors"
    header, rest = header_of(path)
    write(path, header + " " * (MAX_HEADER_BYTES + 1), rest)
    with pytest.raises(AdapterFileError, match="announces a header of"):
        load(folder, make_host())
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterFileError, match="announces a header of"):
        load(folder, make_host())


def test_oversized_files_are_not_read(folder, make_host):
    with open(folder / "model.safetensors", "ab") as file:
        file.truncate(MAX_WEIGHTS_BYTES + 1)
    with pytest.raises(AdapterFileError, match="an adapter has at most"):
        load(folder, make_host())
    (folder / "config.json").write_text(" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(AdapterFileError, match="not an adapter's config.json"):
        load(folder, make_host())


def test_nested_beyond_reason(folder, make_host):
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(AdapterFileError, match="not readable JSON"):
        load(folder, make_host())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder(folder, make_host, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(AdapterFileError, match="leads out of the folder"):
        load(folder, make_host())


def test_links_of_the_hub_cache_are_followed(folder, make_host, tmp_path):
    """A snapshot of the cache is a folder of links into the blobs beside it."""
    repo = tmp_path / "models--alice--ner"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, repo / "blobs" / name)
        (repo / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{name}")
    assert load(repo / "snapshots" / "abc", make_host()).labels


def test_a_subfolder_cannot_climb_out(folder, make_host):
    (folder / "inner").mkdir()
    with pytest.raises(AdapterFileError, match="leads out of the folder"):
        load(folder / "inner", make_host(), subfolder="..")


def test_pickles_are_never_read(tiny_host, tmp_path, make_model):
    """A host that has no safetensors file is refused, whatever its pickle holds."""
    from modeling_unihyperlora import HostError
    from modeling_unihyperlora.hosts import load_host

    shutil.copytree(tiny_host, tmp_path / "host")
    (tmp_path / "host" / "model.safetensors").unlink()
    (tmp_path / "host" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(HostError, match="no safetensors file, load the host yourself"):
        load_host(str(tmp_path / "host"))
