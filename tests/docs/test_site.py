"""The documentation site builds without a warning, and has every page."""

import inspect
import os
import subprocess
import sys

import pytest
import yaml

from modeling_unihyperlora.modeling_unihyperlora import UniHyperLoraPreTrainedModel
from tests.docs.pages import FRONT_MATTER, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder of the built site, what the build said)."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'unihyperlora[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of mkdocs-material, on its successor
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    return folder, done.returncode, done.stdout + done.stderr


def test_it_builds_without_a_warning(site):
    _, status, said = site
    assert status == 0 and "WARNING" not in said, said


def test_every_page_is_in_it(site):
    folder = site[0]
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]:
        address = page.relative_to(ROOT / "docs").with_suffix("")
        address = address.parent if address.name == "index" else address
        assert (folder / address / "index.html").is_file(), page
    assert (folder / "results/index.html").is_file()


def test_the_reference_has_the_docstrings(site):
    text = (site[0] / "reference/models/index.html").read_text(encoding="utf-8")
    for name in ("from_pretrained", "from_host", "load_task", "refine", "detach"):
        assert f"UniHyperLoraPreTrainedModel.{name}" in text
    assert inspect.getdoc(UniHyperLoraPreTrainedModel.from_host).splitlines()[0] in text


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site[0].rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'src="http' not in text and 'rel="stylesheet" href="http' not in text, path


def entries(tree) -> list[str]:
    """The files of a navigation."""
    if isinstance(tree, str):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [file for part in tree for file in entries(part)]


def test_every_page_is_in_the_navigation():
    there = {
        str(page.relative_to(ROOT / "docs")) for kind in ("md", "ipynb") for page in (ROOT / "docs").rglob(f"*.{kind}")
    }
    navigation = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(navigation) == sorted(
        {*there, *(f"results/{page}.md" for page in ("README", "speed", "transfer", "paper", "runs"))}
    )


def test_every_page_says_what_the_reader_has_at_its_end():
    for page in (ROOT / "docs").rglob("*.md"):
        text = FRONT_MATTER.sub("", page.read_text(encoding="utf-8")).strip()
        title, first, *_ = text.split("\n\n")
        assert title.startswith("# "), page
        assert first.startswith(("At the end of this page", "At the end of these pages", "This page")), page
