"""Shared code of ``tag`` and ``classify``: texts from arguments, standard input or files, and loading of models.

Torch is imported only to load a model, to read a file as a data set, or to raise an error.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

TOGETHER = 256  # texts to process before the first result is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tag`` and ``classify``."""
    add = parser.add_argument
    add("adapter", help="folder or Hub id; for onnx the reader's file")
    add("texts", nargs="*", metavar="TEXT", help="a text, a file, or - for standard input")
    add("--host", help="folder or Hub id; default: the adapter's own host")
    add("--task", help="task to use; default: the active task")
    add(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        metavar="NAME",
        help="onnx: needs --host HOST.onnx and no torch",
    )
    add("--json", action="store_true", help="write one JSON object per line")
    add("--batch_size", type=_positive, default=32, metavar="N", help="texts that the host reads at once (32)")
    add(
        "--max_seq_length",
        type=_positive,
        default=128,
        metavar="N",
        help="sub-tokens of a text that it reads at once (128)",
    )


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


def load(model_class: str, arguments: argparse.Namespace):
    """Load the adapter on its host, without transformers' progress bars, which would mix with the output."""
    from transformers.utils import logging

    import modeling_unihyperlora

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with Console(stderr=True).status("Loading and aligning the host …"):
        return getattr(modeling_unihyperlora, model_class).from_pretrained(
            arguments.adapter, base_model_name_or_path=arguments.host, task=arguments.task
        )


def worker(arguments: argparse.Namespace, model_class: str, work: str) -> Callable[[list], list]:
    """A function that tags or classifies a list of texts; ``work`` is "tag" or "classify"."""
    sizes = {"batch_size": arguments.batch_size, "max_seq_length": arguments.max_seq_length}
    if arguments.runtime == "onnx":
        return functools.partial(getattr(load_onnx(arguments), work), **sizes)
    model = load(model_class, arguments)
    from .. import tagging

    return functools.partial(getattr(tagging, work), model, **sizes)


def load_onnx(arguments: argparse.Namespace):
    """Open the two given ONNX files."""
    from ..onnx_runtime import OnnxFileError, OnnxReader

    if arguments.host is None:
        raise OnnxFileError("--runtime onnx also needs the host's file: --host host.onnx")
    if arguments.task is not None:
        raise OnnxFileError("A reader's ONNX file has one task. Leave --task out.")
    return OnnxReader(arguments.host, arguments.adapter)


def work_through(
    given: list[str],
    read_rows: Callable[[Path], Iterable],
    suffixes: tuple[str, ...],
    work: Callable[[list], list],
    show: Callable[[object], None],
) -> None:
    """Process the given texts in groups, and show the result of each text.

    Args:
        given: texts, names of files, or "-"; if empty, standard input.
        read_rows: reads the texts of a file with one of the ``suffixes``; of other files, each line is a text.
        work: maps a list of texts to a list of results.
        show: prints one result.

    Raises:
        DataError: a file cannot be read.
    """
    for texts, count in _sources(given, read_rows, suffixes):
        size = 1 if count is None and sys.stdin.isatty() else TOGETHER
        hidden = count is None or not sys.stderr.isatty() or sys.stdout.isatty()  # it would mix with the output
        with Progress(console=Console(stderr=True), disable=hidden) as progress:
            bar = progress.add_task("texts", total=count)
            while part := list(itertools.islice(texts, size)):
                for found in work(part):
                    show(found)
                progress.advance(bar, len(part))


def _sources(
    given: list[str], read_rows: Callable[[Path], Iterable], suffixes: tuple[str, ...]
) -> Iterator[tuple[Iterator, int | None]]:
    """Yield the texts of each source and their number (None if unknown); adjacent text arguments are one source."""
    for is_text, names in itertools.groupby(given or ["-"], key=lambda name: name != "-" and not _is_file(name)):
        if is_text:
            texts = list(names)
            yield iter(texts), len(texts)
            continue
        for name in names:
            if name == "-":
                yield (line.strip() for line in sys.stdin if line.strip()), None
                continue
            texts = list(read_rows(Path(name)) if name.lower().endswith(suffixes) else _lines(Path(name)))
            yield iter(texts), len(texts)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a path, or a null character in it
        return False


def _lines(path: Path) -> Iterator[str]:
    from ..reading import numbered_lines

    return (line.strip() for _, line in numbered_lines(path) if line.strip())
