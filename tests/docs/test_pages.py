"""Every example of the documentation runs and prints what its page says."""

import shutil

import pytest

from .pages import ROOT, Correction, all_pages, commands_of, folder_of, hosts_of, run_page


def pages():
    for page in all_pages():
        marks = [pytest.mark.slow] if hosts_of(page) else []
        yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


@pytest.fixture(scope="module")
def finished() -> dict:
    return {}


@pytest.mark.parametrize("page", list(pages()))
def test_a_page_prints_what_it_says(page, tmp_path, tokenizer, monkeypatch, finished):
    if missing := [host for host in hosts_of(page) if folder_of(host) is None]:
        pytest.skip(f"needs hosts of the Hub: hf download {' '.join(missing)}")
    wrong = run_page(page, tmp_path, tokenizer, monkeypatch, finished)
    assert not wrong, "\n".join(correction.message for correction in wrong)


class TestTheRunner:
    @pytest.fixture
    def run(self, tmp_path, tokenizer, monkeypatch):
        def run(text: str) -> list[Correction]:
            page = tmp_path / "page.md"
            page.write_text(text)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return run_page(page, tmp_path / "run", tokenizer, monkeypatch, {})

        return run

    def test_an_output_is_compared(self, run):
        page = "```python\nx = 3\nprint(x, 'of', 0.123)\n```\n```text\n{}\n```\n"
        assert run(page.format("3  of 0.1...")) == []
        (wrong,) = run(page.format("4 of 0.1..."))
        assert wrong.instead == "```text\n3 of 0.123\n```"
        assert "page.md:5 printed\n3 of 0.123\n" in wrong.message

    def test_blocks_share_what_they_define(self, run):
        assert run("```python\nx = 3\n```\nand\n```python\nprint(x)\n```\n```text\n3\n```\n") == []

    def test_an_error_is_raised(self, run):
        with pytest.raises(ZeroDivisionError):
            run("```python\n1 / 0\n```\n")

    def test_a_command_is_run_within_the_folder(self, run):
        assert run("```console\n$ echo a > file\n$ cat file\na\n```\n") == []
        (wrong,) = run("```console\n$ echo one\n1\n```\n")
        assert wrong.instead == "```console\n$ echo one\none\n```"

    def test_the_command_of_the_package_is_run(self, run):
        assert run("```console\n$ unihyperlora --version\nunihyperlora ...\n```\n") == []
        with pytest.raises(AssertionError, match="ended with 2"):
            run("```console\n$ unihyperlora no-such-thing\n```\n")

    def test_commands_may_have_several_lines(self):
        assert list(commands_of("$ a \\\n  b\none\ntwo\n$ c\n")) == [("a \\\n  b", "one\ntwo\n"), ("c", "")]

    def test_what_is_not_marked_is_not_run(self, run):
        assert run("```bash\nexit 1\n```\n```yaml\na: 1\n```\n") == []

    def test_a_page_finds_only_the_hosts_that_it_names(self, run):
        code = "```python\nfrom transformers import AutoModel\nmodel = AutoModel.from_pretrained('a/host')\n```\n"
        with pytest.raises(OSError, match="offline mode"):
            run(code)
        shown = "```python\nprint(model.config.num_hidden_layers)\n```\n```text\n3\n```\n"
        assert run(f"<!-- invisible-code-block: python\nrandom_host('a/host', blocks=3)\n-->\n{code}{shown}") == []
