"""The texts that a command was given: as arguments, on standard input, or in files; and what is the same for all.

Torch is imported only where a file is read as a data set, or an error is raised.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

TOGETHER = 256  # texts that are worked on before the first of them is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tag`` and ``classify`` have in common."""
    add = parser.add_argument
    add("adapter", help="its folder or Hub id; for onnx the reader's file")
    add("texts", nargs="*", metavar="TEXT", help="a text, a file, or - for standard input")
    add("--host", help="folder or Hub id; by default the adapter's own host")
    add("--task", help="of an adapter with several tasks")
    add(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        metavar="NAME",
        help="onnx: needs --host HOST.onnx and no torch",
    )
    add("--json", action="store_true", help="write one JSON object a line")
    add("--batch_size", type=_positive, default=32, metavar="N", help="texts that the host reads at a time (32)")
    add("--max_seq_length", type=_positive, default=128, metavar="N", help="sub-tokens that it reads at once (128)")


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


def load(model_class: str, arguments: argparse.Namespace):
    """The adapter on its host, without the library's progress bars, which would mix with what is printed."""
    from transformers.utils import logging

    import modeling_unihyperlora

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with Console(stderr=True).status("Loading the host and lining it up …"):
        return getattr(modeling_unihyperlora, model_class).from_pretrained(
            arguments.adapter, base_model_name_or_path=arguments.host, task=arguments.task
        )


def load_onnx(arguments: argparse.Namespace):
    """The two ONNX files that were given."""
    from ..onnx_runtime import OnnxFileError, OnnxReader

    if arguments.host is None:
        raise OnnxFileError("--runtime onnx needs the host's file as well: --host host.onnx")
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
    """Work on the given texts, several at a time, and show what was found for each.

    Args:
        given: texts, names of files, or "-"; standard input where it is empty.
        read_rows: reads the texts of a file with one of the ``suffixes``. Of any other file each line is a text.
        work: from texts to what was found for each.
        show: prints one finding.

    Raises:
        DataError: a file cannot be read.
    """
    for texts, count in _sources(given, read_rows, suffixes):
        size = 1 if count is None and sys.stdin.isatty() else TOGETHER
        hidden = count is None or not sys.stderr.isatty() or sys.stdout.isatty()  # it would mix with what is shown
        with Progress(console=Console(stderr=True), disable=hidden) as progress:
            bar = progress.add_task("texts", total=count)
            while part := list(itertools.islice(texts, size)):
                for found in work(part):
                    show(found)
                progress.advance(bar, len(part))


def _sources(
    given: list[str], read_rows: Callable[[Path], Iterable], suffixes: tuple[str, ...]
) -> Iterator[tuple[Iterator, int | None]]:
    """The texts of each source and how many they are, None if unknown; texts that stand together are one source."""
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
