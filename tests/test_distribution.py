"""The wheel and the sdist: they build, and what they install works away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = """
import pathlib, sys
import modeling_unihyperlora, trainers
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.modeling_unihyperlora import make_adapter
from modeling_unihyperlora.storage import WEIGHTS_NAME, adapter_file, load_adapter, ready_adapters

environment = pathlib.Path(sys.prefix)
for package in (modeling_unihyperlora, trainers):
    folder = pathlib.Path(package.__file__).parent
    assert environment in folder.parents and (folder / "py.typed").is_file(), folder
for name in ready_adapters():
    adapter = make_adapter(read_config(adapter_file(name, "config.json", None, {})))
    load_adapter(adapter, adapter_file(name, WEIGHTS_NAME, None, {}))
assert modeling_unihyperlora.CanonicalSpace.default().sentences()
print(*ready_adapters())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_they_are_small_and_have_what_is_needed(built):
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.stat().st_size < 5_000_000 and sdist.stat().st_size < 5_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} - {"modeling_unihyperlora", "trainers"} == {
        next(name.split("/")[0] for name in names if name.endswith("METADATA"))
    }
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())


@pytest.mark.slow
def test_what_they_install_works_elsewhere(built, tmp_path):
    """In an environment of its own, which has of this one's packages only what the wheel depends on."""
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    [wheel] = built.glob("*.whl")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, env=alone)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(own, "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # a .pth file there is not followed
    run = {"check": True, "capture_output": True, "text": True, "cwd": tmp_path, "env": alone}
    assert "people-places-organisations" in subprocess.run([python, "-c", SMOKE], **run).stdout
    command = tmp_path / "environment" / "bin" / "unihyperlora"
    assert subprocess.run([command, "--version"], **run).stdout.startswith("unihyperlora 0.")
