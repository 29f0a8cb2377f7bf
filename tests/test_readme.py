"""README.md: short, its links lead somewhere, and its examples print what it says that they print."""

import re
import warnings
from pathlib import Path

import pytest

pages = pytest.importorskip("tests.docs.pages", reason="the runner of the documentation's examples is not there")
folder_of, run_page = pages.folder_of, pages.run_page
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HERE, THERE = "sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/paraphrase-MiniLM-L3-v2"


def test_it_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


@pytest.mark.slow
def test_examples_print_what_it_says(tmp_path, tokenizer, monkeypatch):
    if folder_of(HERE) is None:
        pytest.skip("needs the host of make demo: pip install 'unihyperlora[demo]'")
    text, hosts = README, [HERE, THERE]
    if folder_of(THERE) is None:
        warnings.warn(f"{THERE} is not on this machine, so the example on it is not run.", stacklevel=1)
        before, rest = README.split("## 2. ")
        text, hosts = before + rest[rest.index("## 3. ") :], [HERE]
    page = tmp_path / "README.md"
    page.write_text(f"---\nhosts: [{', '.join(hosts)}]\n---\n{text}", encoding="utf-8")
    wrong = run_page(page, tmp_path / "run", tokenizer, monkeypatch, {})
    assert not wrong, "\n".join(correction.message for correction in wrong)
