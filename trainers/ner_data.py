"""Reading text with one tag a word: JSON lines, column files and data sets of the Hub.

Whatever the source, a sentence ends up as words and tag *names*: ids are turned into names at once, so that the order
in which a file or a data set numbers its labels never matters.

Tags stay in the scheme of the data (IOB2, IOB1, IOBES or bare types).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modeling_unihyperlora.errors import DataError

from .reading import JSON_SUFFIXES, json_rows, listed, load_split, name_of_id, numbered_lines, require_columns

COLUMN_SUFFIXES = (".txt", ".conll", ".tsv", ".bio", ".iob", ".iob2")

_PREFIXED_TAG = re.compile(r"([BIESLU])-(.+)")


@dataclass(frozen=True)
class Sentence:
    """Words and their tags, in equal number (both may be none), and where they were read: "train.jsonl, line 3"."""

    tokens: list[str]
    tags: list[str]
    origin: str


def read_file(
    path: str | Path,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    label_names: list[str] | None = None,
) -> list[Sentence]:
    """Read every sentence of a JSON-lines or column file.

    Args:
        path: ``.jsonl``/``.json`` with one object a line, or ``.txt``/``.conll``/``.tsv``/``.bio``/``.iob`` columns:
            word first, tag last, a blank line after each sentence.
        text_column: name of the list of words; JSON lines only.
        label_column: name of the list of tags, strings or ids; JSON lines only.
        label_names: the name of id 0, 1, …; needed only where the tags are ids.

    Raises:
        DataError: with the file, the line and what to do.
    """
    path = Path(path)
    if path.suffix.lower() in JSON_SUFFIXES:
        sentences = list(_json_lines(path, text_column, label_column, label_names))
    elif path.suffix.lower() in COLUMN_SUFFIXES:
        sentences = list(_columns(path))
    else:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}'. Give JSON lines ({', '.join(JSON_SUFFIXES)}) "
            f"or columns ({', '.join(COLUMN_SUFFIXES)})."
        )
    if not sentences:
        raise DataError(f"{path} has no sentence in it. Give a file with at least one.")
    return sentences


def read_hub_dataset(
    name: str,
    split: str,
    config_name: str | None = None,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    label_names: list[str] | None = None,
    **load_kwargs,
) -> tuple[list[Sentence], list[str] | None]:
    """Read one split of a data set of the Hub, or of a folder that ``datasets.load_dataset`` accepts.

    Args:
        name: Hub id or folder.
        split: "train", or a slice such as "train[:90%]".
        config_name: configuration of the data set, where it has several.
        text_column, label_column, label_names: as for ``read_file``; names that the data set declares come first.
        **load_kwargs: passed on, such as ``cache_dir`` and ``token``.

    Returns:
        The sentences, and the label names of the data set where it has them (a ``ClassLabel`` feature).

    Raises:
        DataError: it cannot be loaded, or its columns are not those asked for.
    """
    rows = load_split(name, split, config_name, **load_kwargs)
    require_columns(f"{name} ({split})", rows.column_names, _columns_by_flag(text_column, label_column))
    element = getattr(rows.features[label_column], "feature", None)
    own_names = list(element.names) if hasattr(element, "names") else None
    sentences = [
        _sentence(words, tags, own_names or label_names, f"{name} ({split}), row {number}")
        for number, (words, tags) in enumerate(zip(rows[text_column], rows[label_column], strict=True))
    ]
    if not sentences:
        raise DataError(f"{name} ({split}) has no sentence in it. Choose another split.")
    return sentences, own_names


def collect_labels(sentences: Iterable[Sentence]) -> list[str]:
    """The tags that occur, in an order that depends on nothing else: O, then by type, B- before I-."""
    return sorted({tag for sentence in sentences for tag in sentence.tags}, key=_label_order)


def check_labels(sentences: Iterable[Sentence], labels: list[str], whose: str) -> None:
    """Raise ``DataError`` at the first tag that is not one of ``labels``; ``whose`` says where those come from."""
    known = set(labels)
    for sentence in sentences:
        for position, tag in enumerate(sentence.tags):
            if tag not in known:
                raise DataError(
                    f"{sentence.origin}: tag '{tag}' of word {position} is not in the label set of {whose}: "
                    f"{listed(labels)}. Correct the tag, or start a task of its own for these labels."
                )


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and entity type: ("B", "PER") of B-PER, ("", "PER") of a bare PER, ("", "O") of O."""
    prefixed = _PREFIXED_TAG.fullmatch(tag)
    return (prefixed[1], prefixed[2]) if prefixed else ("", tag)


def _label_order(tag: str) -> tuple[bool, str, int]:
    prefix, entity_type = split_tag(tag)
    return tag != "O", entity_type, "BIESLU".index(prefix) if prefix else -1


def _json_lines(path: Path, text_column: str, label_column: str, label_names: list[str] | None) -> Iterator[Sentence]:
    example = {text_column: ["Ada", "spoke"], label_column: ["B-PER", "O"]}
    for origin, row in json_rows(path, example):
        require_columns(origin, row, _columns_by_flag(text_column, label_column))
        yield _sentence(row[text_column], row[label_column], label_names, origin)


def _columns(path: Path) -> Iterator[Sentence]:
    """Sentences of a column file; tabs separate where a line has one, else spaces."""
    words: list[str] = []
    tags: list[str] = []
    first_line, width = 0, None
    for number, line in numbered_lines(path):
        if not line.strip(" \t"):
            if words:
                yield Sentence(words, tags, f"{path}, line {first_line}")
            words, tags = [], []
            continue
        fields = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if fields[0] == "-DOCSTART-" or _is_comment(line, fields, width):
            continue
        if len(fields) < 2:
            raise DataError(f"{path}, line {number} has one column ({line!r}). A word and its tag are needed.")
        if width is not None and len(fields) != width:
            raise DataError(
                f"{path}, line {number} has {len(fields)} columns ({line!r}), the lines before it have {width}. "
                "Every line needs the same columns: word first, tag last."
            )
        width = len(fields)
        if not words:
            first_line = number
        words.append(fields[0])
        tags.append(fields[-1].strip())
        if not tags[-1]:
            raise DataError(f"{path}, line {number}: the word {fields[0]!r} has no tag. Write O where there is none.")
    if words:
        yield Sentence(words, tags, f"{path}, line {first_line}")


def _is_comment(line: str, fields: list[str], width: int | None) -> bool:
    """A line such as "# id 12"; the word "#" with its tag ("# O") is data."""
    ends_with_tag = fields[-1] == "O" or split_tag(fields[-1])[0] != ""
    several_words = " " in fields[0]  # "# id 12" and then a tab: no word has a space in it
    return line.startswith("# ") and (several_words or (not ends_with_tag and len(fields) != width))


def _columns_by_flag(text_column: str, label_column: str) -> dict[str, str]:
    return {"--text_column_name": text_column, "--label_column_name": label_column}


def _sentence(words: object, tags: object, label_names: list[str] | None, origin: str) -> Sentence:
    """Check one row and name its tags."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{origin}: the words must be a list of strings, not {str(words)[:80]!r}.")
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) and not isinstance(tag, bool) for tag in tags):
        raise DataError(f"{origin}: the tags must be a list of strings or of ids, not {str(tags)[:80]!r}.")
    if len(words) != len(tags):
        raise DataError(f"{origin} has {len(words)} words and {len(tags)} tags. Give one tag a word.")
    return Sentence(words, [_tag_name(tag, label_names, origin) for tag in tags], origin)


def _tag_name(tag: str | int, label_names: list[str] | None, origin: str) -> str:
    if isinstance(tag, str):
        if tag.split() != [tag]:
            raise DataError(f"{origin}: the tag {tag!r} is empty or has a space in it. Write O where there is none.")
        return tag
    if label_names is None:
        raise DataError(
            f"{origin}: the tags are ids (such as {tag}) and nothing says what they are called. "
            "Name them in order: --tag_names O B-PER I-PER …"
        )
    return name_of_id(tag, label_names, origin)
