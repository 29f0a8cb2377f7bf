"""The notebooks of the documentation run from top to bottom."""

import os

import pytest

from tests.docs.pages import ROOT, HubCache, folder_of

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
HOSTS = ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-mpnet-base-v2")


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    if missing := [host for host in HOSTS if folder_of(host) is None]:
        pytest.skip(f"needs hosts of the Hub: hf download {' '.join(missing)}")
    cache = HubCache(tmp_path / "hub")
    for host in HOSTS:
        cache.put(host, folder_of(host))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    shown = nbformat.read(path, as_version=4)
    run = nbclient.NotebookClient(
        nbformat.read(path, as_version=4), timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    run.execute()
    for expected, found in zip(shown.cells, run.nb.cells, strict=True):
        assert printed(found) == printed(expected)


def printed(cell) -> str:
    """What a cell printed; pictures, logs and values apart."""
    outputs = cell.get("outputs", [])
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
