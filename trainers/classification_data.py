"""Reads texts, or pairs of texts, with one label each: JSON lines, CSV and data sets of the Hub.

Every reader returns label *names*:

- A string is a name. true and false have the names True and False.
- A whole number is its own name if no names are given, or if the given names are numbers too (1 … 5 stars). Otherwise
  it is an index into the given names (0 is "negative" of "negative", "positive").
- CSV values are strings: 7 and -1 count as whole numbers; 007, +1 and 1.0 are names.

If a column is not named, the first existing entry of ``TEXT_COLUMNS`` or ``LABEL_COLUMNS`` is used.
"""

import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from modeling_unihyperlora.errors import DataError

from .reading import (
    JSON_SUFFIXES,
    UNKNOWN_ID,
    check_text,
    json_rows,
    listed,
    load_split,
    name_of_id,
    read_text,
    require_columns,
    warn_of_likeness,
)

logger = logging.getLogger(__name__)

TEXT_COLUMNS = (  # pairs first: a question without its passage is not an example
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question", "sentence"),
    ("sentence", None),
    ("text", None),
    ("content", None),
)
LABEL_COLUMNS = ("label", "labels", "answer")

_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python and JSON write it: 01, +1 and ١ are names
_DIGITS = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Example:
    """A text, the second text of a pair or None, the label (None if unknown), the origin ("train.csv, line 3").

    ``stored`` locates the canonical states of the words, if they are stored.
    """

    text: str
    pair: str | None
    label: str | None
    origin: str
    stored: object | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None for a column that does not exist."""

    text: str
    pair: str | None
    label: str | None


def read_file(
    path: str | Path,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    needs_label: bool = True,
    label_names: list[str] | None = None,
) -> list[Example]:
    """Read every example of a JSON-lines or CSV file.

    Args:
        path: ``.jsonl``/``.json`` with one object per line, or ``.csv`` with column names in its first line.
        text_column, pair_column, label_column: names of the columns; guessed if None.
        needs_label: refuse a file without a label column.
        label_names: names of whole numbers, see above.

    Raises:
        DataError: names the file and the line, and says what to do.
    """
    path = Path(path)
    is_csv = path.suffix.lower() == ".csv"
    if path.suffix.lower() in JSON_SUFFIXES:
        rows = json_rows(path, {text_column or "text": "well done", label_column or "label": "positive"})
    elif is_csv:
        rows = _csv_rows(path)
    else:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}'. Give JSON lines ({', '.join(JSON_SUFFIXES)}) "
            "or CSV (.csv)."
        )
    examples: list[Example] = []
    columns = None
    for origin, row in rows:
        if columns is None:
            columns = choose_columns(str(path), row, text_column, pair_column, label_column, needs_label)
        if is_csv and columns.label is not None:
            row[columns.label] = _typed(row[columns.label])
        examples.append(_example(row, columns, label_names, origin))
    if not examples:
        raise DataError(f"{path} has no example in it. Give a file with at least one example.")
    return examples


def read_hub_dataset(
    name: str,
    split: str,
    config_name: str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    needs_label: bool = True,
    label_names: list[str] | None = None,
    **load_kwargs,
) -> tuple[list[Example], list[str] | None]:
    """Read one split of a data set of the Hub, or of a folder that ``datasets.load_dataset`` accepts.

    Args:
        name: Hub id or folder.
        split: "train", or a slice such as "train[:90%]".
        config_name: configuration of the data set, if it has several.
        text_column, pair_column, label_column, needs_label, label_names: as for ``read_file``; label names that the
            data set declares take precedence, and its id -1 is an unknown label.
        **load_kwargs: passed to ``datasets.load_dataset``, such as ``cache_dir`` and ``token``.

    Returns:
        The examples, and the label names that the data set declares (a ``ClassLabel`` feature), or None.

    Raises:
        DataError: the split cannot be loaded, or a column is missing.
    """
    rows = load_split(name, split, config_name, **load_kwargs)
    where = f"{name} ({split})"
    columns = choose_columns(where, rows.column_names, text_column, pair_column, label_column, needs_label)
    feature = rows.features[columns.label] if columns.label is not None else None
    own_names = list(feature.names) if hasattr(feature, "names") else None
    examples = []
    for number, row in enumerate(rows):
        origin = f"{where}, row {number}"
        if own_names is not None:
            label = row[columns.label]
            row = row | {columns.label: None if label == UNKNOWN_ID else name_of_id(label, own_names, origin)}
        examples.append(_example(row, columns, label_names, origin))
    if not examples:
        raise DataError(f"{where} has no example in it. Choose another split.")
    return examples, own_names


def choose_columns(
    origin: str,
    present: Iterable[str],
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    needs_label: bool = True,
) -> Columns:
    """Choose the columns to read: the named ones, and known names for the others.

    Raises:
        DataError: a named column does not exist, or no known name does.
    """
    present = list(present)
    if text is not None:
        named = {"--text_column_name": text} | ({} if pair is None else {"--text_pair_column_name": pair})
        require_columns(origin, present, named)
    elif pair is not None:
        raise DataError(
            f"--text_pair_column_name {pair} needs --text_column_name: give the column of the pair's first text."
        )
    else:
        known = [names for names in TEXT_COLUMNS if {*names} - {None} <= {*present}]
        if not known:
            halves = [names for names in TEXT_COLUMNS if len({*names} & {*present}) == 1]
            lone = "".join(f" ({a} without {b})" if a in present else f" ({b} without {a})" for a, b in halves[:1])
            raise DataError(
                f"{origin} has no column that is known to hold text{lone}; it has {listed(present)}. Name it with "
                "--text_column_name, and --text_pair_column_name for pairs."
            )
        text, pair = known[0]
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in present), None)
        if label is None and needs_label:
            raise DataError(
                f"{origin} has no column that is known to hold labels; it has {listed(present)}. Name it with "
                "--label_column_name."
            )
    elif needs_label:
        require_columns(origin, present, {"--label_column_name": label})
    elif label not in present:
        label = None
    logger.info("%s: text in %s, label in %s", origin, " and ".join(filter(None, (text, pair))), label or "no column")
    return Columns(text, pair, label)


def collect_labels(examples: Iterable[Example]) -> list[str]:
    """All labels of the examples, in a fixed order: numerical if all are numbers, else alphabetical."""
    found = {example.label for example in examples} - {None}
    return sorted(found, key=int) if all(map(_NUMBER.fullmatch, found)) else sorted(found)


def check_splits(splits: Mapping[str, list[Example]], labels: list[str], whose: str) -> None:
    """Check all splits against ``labels``; error messages say with ``whose`` where the labels come from.

    A class without training examples only causes a warning, since the data may be a small sample.

    Raises:
        DataError: a label is not one of ``labels``, a label is missing outside "test", or only some splits have pairs.
    """
    check_class_names(labels, whose)
    known = set(labels)
    first = next(iter(splits), None)
    for split, examples in splits.items():
        unknown = sum(example.label is None for example in examples)
        if unknown and (split != "test" or unknown < len(examples)):
            example = next(example for example in examples if example.label is None)
            raise DataError(
                f"{example.origin} has no label. Label every example; only a whole test set may have no labels."
            )
        for example in examples:
            if example.label is not None and example.label not in known:
                raise DataError(
                    f"{example.origin}: label '{example.label}' is not in the label set of {whose}: {listed(labels)}. "
                    "Correct the label, or name a new task for these labels."
                )
        if (examples[0].pair is None) != (splits[first][0].pair is None):
            raise DataError(
                f"One of {first} and {split} has pairs of texts, the other has single texts. Name the columns with "
                "--text_column_name, and --text_pair_column_name for pairs."
            )
    absent = known - {example.label for example in splits.get("train", [])}
    if absent and "train" in splits:
        logger.warning("No training example has label %s: it will hardly ever be predicted.", listed(sorted(absent)))


def check_class_names(labels: list[str], whose: str) -> None:
    """Check the names of labels; warn of two that differ only in blanks or capitals.

    Raises:
        DataError: a label is empty or has a line break, which predictions.txt cannot hold.
    """
    for label in labels:
        label_name(label, None, f"The labels of {whose}")
    warn_of_likeness(labels, whose)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (origin, row) for each row of a CSV file; the origin names the row's last line, and values are strings."""
    text = read_text(path)
    # A text may be longer than the default limit of 131,072 characters.
    default_limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        yield from _csv_rows_of(text, path)
    finally:
        csv.field_size_limit(default_limit)


def _csv_rows_of(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name for name in reader.fieldnames or [] if name]
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise DataError(
                f"{path}, line {reader.line_num} names the column {listed(map(repr, twice))} twice. Give every column "
                "a different name; it is unclear which of the two is meant."
            )
        for row in reader:
            origin = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{origin} does not have as many fields as the first line has columns "
                    f"({listed(reader.fieldnames or [])}). Put a text with a comma or a line break in double quotes."
                )
            yield origin, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num} is not CSV ({error}). Write it again, or use JSON lines."
        ) from error


def _typed(label: str) -> str | int | None:
    """Convert a CSV label to what JSON would hold: None if empty, an int for a whole number, else the string."""
    if label == "":
        return None
    return int(label) if _NUMBER.fullmatch(label) else label


def _example(row: Mapping[str, object], columns: Columns, label_names: list[str] | None, origin: str) -> Example:
    """Check one row and turn its label into a name."""
    named = {"--text_column_name": columns.text}
    named |= {"--text_pair_column_name": columns.pair} if columns.pair is not None else {}
    named |= {"--label_column_name": columns.label} if columns.label is not None else {}
    require_columns(origin, row, named)
    texts = [None if column is None else row[column] for column in (columns.text, columns.pair)]
    for column, text in zip((columns.text, columns.pair), texts, strict=True):
        if column is not None and not isinstance(text, str):
            raise DataError(f"{origin}: '{column}' must be a string, not {str(text)[:80]!r}. Name another column.")
        check_text(text or "", f"'{column}'", origin)
    label = None if columns.label is None else label_name(row[columns.label], label_names, origin)
    return Example(*texts, label, origin)


def label_name(label: object, names: list[str] | None, origin: str) -> str | None:
    """Convert a label of the data to its name; None if it is unknown.

    Raises:
        DataError: the value is not a label, or is an id without a name.
    """
    if label is None:
        return None
    if isinstance(label, str):
        if not label.strip() or label.splitlines() != [label]:
            raise DataError(f"{origin}: the label {label!r} is empty or has a line break in it. Rename it.")
        check_text(label, "the label", origin)
        return label
    if not isinstance(label, int):
        raise DataError(
            f"{origin}: a label is a string, a whole number or true/false, not {str(label)[:80]!r}. "
            "Name another column with --label_column_name."
        )
    own_name = str(label)
    if names is None or own_name in names or all(map(_DIGITS.fullmatch, names)):
        return own_name
    return name_of_id(int(label), names, origin)
