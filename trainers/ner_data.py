"""Reads text with one tag per word: JSON lines, column files and data sets of the Hub.

Every reader returns words and tag *names*. Ids become names at once, so the order in which a file or data set numbers
its labels does not matter.

Tags keep the scheme of the data (see ``tag_schemes``). All readers accept the same words and the same tags. A test set
may have no tags.
"""

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
    numbered_lines,
    require_columns,
    warn_of_likeness,
)
from .scheme_inference import count_broken, infer_scheme
from .tag_schemes import split_tag

logger = logging.getLogger(__name__)

COLUMN_SUFFIXES = (".txt", ".conll", ".tsv", ".bio", ".iob", ".iob2", ".conllu", ".conllup")
ID, FORM = "ID", "FORM"  # CoNLL-U's names for the column of word numbers and the column of words

_COLUMN_NAMES = re.compile(r"# *global\.columns *= *(.*\S)")
_NOT_A_WORD = re.compile(r"[0-9]+[-.][0-9]+")  # id of a CoNLL-U line for several words (1-2) or for no word (8.1)


@dataclass(frozen=True)
class Sentence:
    """The words of a sentence, one tag per word (None if the tags are unknown), and its origin.

    A sentence may be empty. The origin is text such as "train.jsonl, line 3". ``stored`` locates the canonical states
    of the words, if they are stored.
    """

    tokens: list[str]
    tags: list[str] | None
    origin: str
    stored: object | None = None


def read_file(
    path: str | Path,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    label_names: list[str] | None = None,
    needs_tags: bool = True,
) -> list[Sentence]:
    """Read every sentence of a JSON-lines or column file.

    Args:
        path: ``.jsonl``/``.json`` with one object per line, or ``.txt``/``.conll``/``.tsv``/``.bio``/``.iob`` with
            columns: word first, tag last, a blank line after each sentence. A first line "# global.columns = ID FORM
            …" names the columns of a CoNLL-U Plus file.
        text_column: name of the list of words; in a file with named columns, the column of words (FORM if there is no
            such column).
        label_column: name of the list of tags (strings or ids), or of the column of tags.
        label_names: names of the ids 0, 1, …; needed only if the tags are ids.
        needs_tags: refuse a file without tags. A column file without tags has one column; in other files the tags are
            missing, null or all -1.

    Raises:
        DataError: names the file and the line, and says what to do.
    """
    path = Path(path)
    if path.suffix.lower() in JSON_SUFFIXES:
        sentences = list(_json_lines(path, text_column, label_column, label_names, needs_tags))
    elif path.suffix.lower() in COLUMN_SUFFIXES:
        sentences = _column_sentences(path, text_column, label_column, needs_tags)
    else:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}'. Give JSON lines ({', '.join(JSON_SUFFIXES)}) "
            f"or columns ({', '.join(COLUMN_SUFFIXES)})."
        )
    if not sentences:
        raise DataError(f"{path} has no sentence in it. Give a file with at least one sentence.")
    return _warn_of_blank_words(sentences, str(path))


def read_hub_dataset(
    name: str,
    split: str,
    config_name: str | None = None,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    label_names: list[str] | None = None,
    needs_tags: bool = True,
    **load_kwargs,
) -> tuple[list[Sentence], list[str] | None]:
    """Read one split of a data set of the Hub, or of a folder that ``datasets.load_dataset`` accepts.

    Args:
        name: Hub id or folder.
        split: "train", or a slice such as "train[:90%]".
        config_name: configuration of the data set, if it has several.
        text_column, label_column, label_names, needs_tags: as for ``read_file``; label names that the data set
            declares take precedence.
        **load_kwargs: passed to ``datasets.load_dataset``, such as ``cache_dir`` and ``token``.

    Returns:
        The sentences, and the label names that the data set declares (a ``ClassLabel`` feature), or None.

    Raises:
        DataError: the split cannot be loaded, or a column is missing.
    """
    rows = load_split(name, split, config_name, **load_kwargs)
    has_tags = needs_tags or label_column in rows.column_names
    require_columns(f"{name} ({split})", rows.column_names, _columns_by_flag(text_column, label_column, has_tags))
    element = getattr(rows.features[label_column], "feature", None) if has_tags else None
    own_names = list(element.names) if hasattr(element, "names") else None
    tags_of_rows = rows[label_column] if has_tags else [None] * len(rows)
    sentences = [
        sentence_of(words, tags, own_names or label_names, f"{name} ({split}), row {number}", needs_tags)
        for number, (words, tags) in enumerate(zip(rows[text_column], tags_of_rows, strict=True))
    ]
    if not sentences:
        raise DataError(f"{name} ({split}) has no sentence in it. Choose another split.")
    return _warn_of_blank_words(sentences, f"{name} ({split})"), own_names


def collect_labels(sentences: Iterable[Sentence]) -> list[str]:
    """All tags of the sentences, in a fixed order: O first, then by type, B- before I-."""
    return sorted({tag for sentence in sentences for tag in sentence.tags or []}, key=_label_order)


def check_splits(splits: Mapping[str, list[Sentence]], labels: list[str], whose: str) -> None:
    """Check all splits against ``labels``; error messages say with ``whose`` where the labels come from.

    Raises:
        DataError: a tag is not one of ``labels``, tags are missing outside "test", or a label cannot be a tag.
    """
    for label in labels:
        check_tag(label, f"The labels of {whose}")
    warn_of_likeness(labels, whose)
    for split, sentences in splits.items():
        untagged = [sentence for sentence in sentences if sentence.tags is None]
        if untagged and (split != "test" or any(sentence.tags for sentence in sentences)):
            raise DataError(
                f"{untagged[0].origin} has no tags. Tag every sentence; only a whole test set may have no tags."
            )
        check_labels(sentences, labels, whose)


def scheme_of_splits(
    splits: Mapping[str, list[Sentence]], labels: list[str], known: str | None, stated: str | None
) -> str | None:
    """Determine the scheme of a task's tags.

    Args:
        splits: sentences of "train", "validation" and "test"; splits may be missing.
        labels: all labels of the task.
        known: scheme saved with the task; None for a new task or an old adapter.
        stated: scheme given by the user, or None.

    Returns:
        The known scheme, else the stated one, else the one inferred from the training tags; None without any of these.

    Raises:
        DataError: the schemes contradict each other, or the tags fit no scheme.
    """
    if known is not None and stated not in (None, known):
        raise DataError(
            f"--tag_scheme {stated}: the task of the adapter is {known}. Leave the flag out, or name a new task with "
            "--task_name."
        )
    scheme = known or stated
    tagged = {
        split: [(x.origin, x.tags) for x in sentences if x.tags is not None] for split, sentences in splits.items()
    }
    if "train" in tagged:
        found = infer_scheme(tagged["train"], labels, stated if known is None else None)
        if known is not None and found != known and count_broken(tagged["train"], labels, known)[0]:
            raise DataError(
                f"The training tags are {found}, but the task of the adapter is {known}. Convert the tags to {known}, "
                "or name a new task with --task_name."
            )
        scheme = known or found
    for split in tagged.keys() - {"train"} if scheme else ():
        count, where = count_broken(tagged[split], labels, scheme)
        if count:
            logger.warning(
                "The tags of %s break the rules of %s, the task's scheme, %d times, first in %s. seqeval decides "
                "what counts as an entity there.",
                split,
                scheme,
                count,
                where,
            )
    return scheme


def check_labels(sentences: Iterable[Sentence], labels: list[str], whose: str) -> None:
    """Raise ``DataError`` for the first tag that is not one of ``labels``; ``whose`` names the labels' owner."""
    known = set(labels)
    for sentence in sentences:
        for position, tag in enumerate(sentence.tags or []):
            if tag not in known:
                raise DataError(
                    f"{sentence.origin}: tag '{tag}' of word {position} is not in the label set of {whose}: "
                    f"{listed(labels)}. Correct the tag, or name a new task for these labels."
                )


def check_tag(tag: str, origin: str) -> None:
    """Raise ``DataError`` for a tag that is empty or has a space: predictions.txt separates tags by spaces."""
    if tag.split() != [tag]:
        raise DataError(
            f"{origin}: the tag {tag!r} is empty or has a space in it. Write O for a word outside entities, and a "
            "hyphen or an underscore instead of a space."
        )
    check_text(tag, "the tag", origin)


def check_word(word: str, origin: str) -> None:
    """Raise ``DataError`` for text that cannot be a word; an empty or blank word is allowed and read as unknown."""
    if not word.isascii() or "\n" in word or "\r" in word:
        check_text(word, "the word", origin)
        if word.strip() and not {"\n", "\r"}.isdisjoint(word):
            raise DataError(f"{origin}: the word {word[:80]!r} has a line break in it. Split it into two words.")


def _label_order(tag: str) -> tuple[bool, str, int]:
    prefix, entity_type = split_tag(tag)
    return tag != "O", entity_type, "BIMESLU".index(prefix) if prefix else -1


def _json_lines(
    path: Path, text_column: str, label_column: str, label_names: list[str] | None, needs_tags: bool
) -> Iterator[Sentence]:
    example = {text_column: ["Ada", "spoke"], label_column: ["B-PER", "O"]}
    for origin, row in json_rows(path, example):
        has_tags = needs_tags or label_column in row
        require_columns(origin, row, _columns_by_flag(text_column, label_column, has_tags))
        yield sentence_of(row[text_column], row.get(label_column), label_names, origin, needs_tags)


@dataclass
class _Line:
    """A line of a column file that is neither blank nor a comment."""

    number: int
    fields: list[str]
    text: str


def _column_sentences(path: Path, text_column: str, label_column: str, needs_tags: bool) -> list[Sentence]:
    """Sentences of a column file; tabs separate the columns if the first line has a tab, else spaces do."""
    names, blocks = _column_blocks(path)
    lines = [line for block in blocks for line in block]
    if not lines:
        return []
    width = len(lines[0].fields)
    for line in lines:
        if len(line.fields) != width:
            raise DataError(
                f"{path}, line {line.number} has {_counted(len(line.fields))} ({line.text!r}), but the lines before "
                f"it have {width}. Every line needs the same columns, separated by tabs or by spaces: word first, tag "
                "last. To tag raw text, use `unihyperlora tag`."
            )
    if names is not None:
        word_at, tag_at = _places(path, names, width, text_column, label_column, needs_tags)
    else:
        word_at, tag_at = 0, width - 1 if width > 1 else None
        _check_order(path, blocks)
    if tag_at is None and needs_tags:
        raise DataError(
            f"{path}, line {lines[0].number} has one column ({lines[0].text!r}). Give a word and its tag; only a test "
            "set may have words alone."
        )
    sentences = []
    for block in blocks:
        words = [line.fields[word_at] for line in block]
        tags = None if tag_at is None else [line.fields[tag_at].strip() for line in block]
        for line, word, tag in zip(block, words, tags or words, strict=True):
            origin = f"{path}, line {line.number}"
            check_word(word, origin)
            if tags is not None:
                if not tag:
                    raise DataError(f"{origin}: the word {word!r} has no tag. Write O for a word outside entities.")
                check_tag(tag, origin)
        sentences.append(Sentence(words, tags, f"{path}, line {block[0].number}"))
    return sentences


def _column_blocks(path: Path) -> tuple[list[str] | None, list[list[_Line]]]:
    """Names of the columns if a comment gives them (else None), and the lines of each sentence."""
    names: list[str] | None = None
    blocks: list[list[_Line]] = [[]]
    width, tabs = None, False
    for number, text in numbered_lines(path):
        if "\r" in text:
            raise DataError(
                f"{path}, line {number} has a carriage return inside ({text[:40]!r}). Write the file again with a "
                "line feed after each line; for instance: tr '\\r' '\\n'."
            )
        if named := _COLUMN_NAMES.fullmatch(text):
            names = named[1].split()
            continue
        if not text.strip(" \t"):
            blocks.append([])
            continue
        own_tabs = "\t" in text if width is None else tabs
        fields = text.split("\t") if own_tabs else re.split("[ \t]+", text.strip(" \t"))
        comment = _is_comment(text, text.split("\t") if "\t" in text else fields, width)
        if comment or text.split()[:1] == ["-DOCSTART-"] or (text.startswith("#") and names and names[0] == ID):
            continue
        width, tabs = len(fields), own_tabs
        if names and names[0] == ID and _NOT_A_WORD.fullmatch(fields[0]):
            continue
        blocks[-1].append(_Line(number, fields, text))
    return names, [block for block in blocks if block]


def _places(
    path: Path, names: list[str], width: int, text_column: str, label_column: str, needs_tags: bool
) -> tuple[int, int | None]:
    """Positions of the column of words and the column of tags (None if there is none) among named columns."""
    if len(names) != width or len(set(names)) != width:
        raise DataError(
            f"{path}: '# global.columns' names {_counted(len(names))} ({listed(names)}), but the lines have {width}. "
            "Name each column once."
        )
    word = text_column if text_column in names else FORM
    require_columns(str(path), names, {"--text_column_name": word})
    if label_column in names:
        return names.index(word), names.index(label_column)
    require_columns(str(path), names, {"--label_column_name": label_column} if needs_tags else {})
    return names.index(word), None


def _check_order(path: Path, blocks: list[list[_Line]]) -> None:
    """Raise ``DataError`` if the first column seems to hold ids or tags instead of words."""
    first = [[line.fields[0] for line in block] for block in blocks]
    width = len(blocks[0][0].fields)
    ids = [[field for field in block if not _NOT_A_WORD.fullmatch(field)] for block in first]
    for start in (0, 1):
        counted = all(block == [str(start + number) for number in range(len(block))] for block in ids)
        if counted and width > 2 and any(len(block) > 1 for block in ids):
            raise DataError(
                f"{path}: the first column counts the words of each sentence ({', '.join(first[0][:3])} …), as in "
                "CoNLL-U. Name the columns in the first line, such as '# global.columns = "
                f"{' '.join([ID, FORM, 'NER', *(f'OTHER{n}' for n in range(1, width - 2))])}', and give "
                "--label_column_name NER. Or delete the ids, so that the word comes first and the tag last."
            )
    share = [
        sum(line.fields[at] == "O" or split_tag(line.fields[at])[0] != "" for block in blocks for line in block)
        for at in (0, -1)
    ]
    if width > 1 and share[0] > share[1] and 2 * share[0] > sum(map(len, blocks)):
        line = blocks[0][0]
        raise DataError(
            f"{path}, line {line.number}: the first column seems to hold the tags ({line.text!r}). The word must come "
            "first and the tag last; swap them, for instance with: awk 'NF {print $2, $1; next} {print}'."
        )


def _is_comment(line: str, fields: list[str], width: int | None) -> bool:
    """Whether a line is a comment such as "# id 12"; the word "#" with its tag ("# O") is data."""
    ends_with_tag = fields[-1] == "O" or split_tag(fields[-1])[0] != ""
    several_words = " " in fields[0]  # "# id 12" before a tab: a word has no space in it
    return line.startswith("# ") and (several_words or (not ends_with_tag and len(fields) != width))


def _counted(columns: int) -> str:
    return "one column" if columns == 1 else f"{columns} columns"


def _columns_by_flag(text_column: str, label_column: str, has_tags: bool) -> dict[str, str]:
    return {"--text_column_name": text_column} | ({"--label_column_name": label_column} if has_tags else {})


def sentence_of(words: object, tags: object, label_names: list[str] | None, origin: str, needs_tags: bool) -> Sentence:
    """Check one row and turn its tag ids into names.

    Raises:
        DataError: the words are not a list of strings, or there is not one tag per word.
    """
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{origin}: the words must be a list of strings, not {str(words)[:80]!r}.")
    for word in words:
        check_word(word, origin)
    unknown = tags is None or (isinstance(tags, list) and tags and all(tag == UNKNOWN_ID for tag in tags))
    if unknown and not needs_tags:
        return Sentence(words, None, origin)
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) and not isinstance(tag, bool) for tag in tags):
        raise DataError(f"{origin}: the tags must be a list of strings or of ids, not {str(tags)[:80]!r}.")
    if len(words) != len(tags):
        raise DataError(f"{origin} has {len(words)} words and {len(tags)} tags. Give one tag per word.")
    names = [_tag_name(tag, label_names, origin) for tag in tags]
    for name in names:
        check_tag(name, origin)
    return Sentence(words, names, origin)


def _warn_of_blank_words(sentences: list[Sentence], where: str) -> list[Sentence]:
    """Warn of empty and blank words, which no host can read; returns the sentences unchanged."""
    blank = sum(not word.strip() for sentence in sentences for word in sentence.tokens)
    if blank:
        logger.warning("%s: %d words are empty or blank; each is read as an unknown word.", where, blank)
    return sentences


def _tag_name(tag: str | int, label_names: list[str] | None, origin: str) -> str:
    if isinstance(tag, str):
        return tag
    if label_names is None:
        raise DataError(
            f"{origin}: the tags are ids (such as {tag}) and have no names. Name them in order: --tag_names O B-PER "
            "I-PER …"
        )
    return name_of_id(tag, label_names, origin)
