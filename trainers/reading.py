"""Reading shared by all kinds of data: lines of a file, splits of the Hub, columns, texts, label names."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from modeling_unihyperlora.errors import DataError

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".json")
UNKNOWN_ID = -1  # label id that data sets of the Hub use for a secret label
PARQUET_BRANCH = "refs/convert/parquet"  # the Hub's conversion of data sets that are made by a script

_SHOWN = 24  # a message lists this many labels or columns and counts the rest


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8; the message gives the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line} is not UTF-8 (byte 0x{content[error.start]:02x}). "
            "Convert the file, for instance: iconv -f latin1 -t utf-8."
        ) from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; only line feeds end a line, since a word may contain other separators."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        yield number, line.removesuffix("\r")


def json_rows(path: Path, example: Mapping[str, object]) -> Iterator[tuple[str, dict]]:
    """Yield (origin, object) for each line of a JSON-lines file; errors show ``example`` as a valid line."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        origin = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
        except _Twice as error:
            raise DataError(
                f"{origin} names '{error}' twice. Give each name one value; it is unclear which of the two is meant."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{origin} is not JSON ({error}). Each line must be one object, such as {json.dumps(example)}."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{origin} is a JSON {type(row).__name__}, not an object. Write one object per line (JSON lines), "
                "not one list for the whole file."
            )
        yield origin, row


class _Twice(ValueError):
    """A JSON object has a name twice; Python would silently keep the last value."""


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, value in pairs:
        if name in row:
            raise _Twice(name)
        row[name] = value
    return row


def load_split(name: str, split: str, config_name: str | None, **load_kwargs):
    """Load a split from the Hub, or from a folder that ``datasets.load_dataset`` accepts; never runs a script.

    Raises:
        DataError: the split cannot be loaded.
    """
    import datasets

    try:
        try:
            return datasets.load_dataset(name, config_name, split=split, **load_kwargs)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or "revision" in load_kwargs:
                raise
            logger.warning("A script makes %s, and scripts are never run: reading %s instead.", name, PARQUET_BRANCH)
            # On that branch each configuration is a folder.
            return datasets.load_dataset(
                name, data_dir=config_name, split=split, revision=PARQUET_BRANCH, **load_kwargs
            )
    except Exception as error:  # the library raises some twenty types; each means that loading failed
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DataError(
            f"The data set '{name}' (configuration {config_name or 'default'}, split {split}) cannot be loaded: "
            f"{reason}. Check the name, the split and the connection, or give --train_file, --validation_file and "
            "--test_file."
        ) from error


def check_text(text: str, what: str, origin: str) -> None:
    """Raise ``DataError`` for a text with half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin}: {what} has half of a surrogate pair in it ({text[:40]!a}), which is not a character. Write "
            "the file again in UTF-8."
        ) from error


def require_columns(origin: str, present: Iterable[str], columns: Mapping[str, str]) -> None:
    """Raise ``DataError`` if a column is not ``present``; ``columns`` maps a flag to the column that it names."""
    for flag, column in columns.items():
        if column not in present:
            raise DataError(
                f"{origin} has no column '{column}'; it has {listed(present)}. Name the right one with {flag}."
            )


def name_of_id(number: int, names: list[str], origin: str) -> str:
    """Name of a label id; raises ``DataError`` if the id has no name."""
    if not 0 <= number < len(names):
        raise DataError(f"{origin}: id {number} is outside the {len(names)} labels: {listed(names)}.")
    return names[number]


def check_label_names(names: list[str], labels: list[str], whose: str) -> None:
    """Raise ``DataError`` if a data set declares ``names`` that ``labels`` lacks, or if ``labels`` repeats a name."""
    twice = [name for number, name in enumerate(labels) if name in labels[:number]]
    if twice:
        raise DataError(
            f"The labels of {whose} name {listed(map(repr, twice))} twice: {listed(labels)}. Name each label once."
        )
    extra = [name for name in names if name not in set(labels)]
    if extra:
        raise DataError(
            f"The data set declares labels that {whose} does not have: {listed(extra)}. It has {listed(labels)}. "
            "Use data with these labels, or add a new task for the other labels: give it a name with --task_name."
        )


def warn_of_likeness(labels: list[str], whose: str) -> None:
    """Warn of labels that differ only in blanks or capitals."""
    alike: dict[str, str] = {}
    for label in labels:
        other = alike.setdefault(" ".join(label.casefold().split()), label)
        if other != label:
            logger.warning(
                "The labels %r and %r of %s differ only in blanks or capitals; they count as two classes.",
                other,
                label,
                whose,
            )


def listed(names: Iterable[str]) -> str:
    """Names as text for a message; long lists are shortened."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + rest
