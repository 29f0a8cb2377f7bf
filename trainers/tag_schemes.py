"""Tag schemes, which mark where entities begin and end: IOB1, IOB2, IOBES, BILOU, BMES, IO (I- only, or bare types).

The scheme is inferred from the training tags (``scheme_inference``) and saved with the task. Decoding and scoring
follow it. Without a scheme (None), any tag may follow any other.

A label has a role and a type. The roles are B (begins an entity of several words), I (inside), E (ends the entity),
S (an entity of one word) and O (outside). Each scheme has its own letters for the roles. "B", "I" and "O" alone are
tags of a single type without a name.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

UNNAMED = "entity"  # type of the tags B, I and the like that name no type

ROLES = dict(zip("BIMELSU", "BIIEESS", strict=True))
LETTERS = {"IOB2": "BI", "IOB1": "BI", "IOBES": "BIES", "BILOU": "BILU", "BMES": "BMES"}
_PREFIXED = re.compile(r"([BIMESLU])-(.+)")


class Tag(NamedTuple):
    """The meaning of a label: its role (B, I, E, S or O) and the type of the entity."""

    role: str
    type: str


OUTSIDE = Tag("O", "")


def split_tag(label: str) -> tuple[str, str]:
    """Prefix and entity type: ("B", "PER") of B-PER, ("", "PER") of a bare PER, ("", "O") of O."""
    prefixed = _PREFIXED.fullmatch(label)
    return (prefixed[1], prefixed[2]) if prefixed else ("", label)


def tags_of_labels(labels: Iterable[str], scheme: str | None) -> dict[str, Tag]:
    """The meaning of each label in a scheme; a bare type X means inside an entity of type X."""
    entities = [label for label in labels if label != "O"]
    if scheme is not None and letters_alone(entities):
        found = {label: Tag(ROLES[label], UNNAMED) for label in entities}
    elif scheme == "IO" and not all(split_tag(label)[0] == "I" for label in entities):
        found = {label: Tag("I", label) for label in entities}
    else:
        split = {label: split_tag(label) for label in entities}
        found = {label: Tag(ROLES[prefix] if prefix else "I", kind) for label, (prefix, kind) in split.items()}
    return found | {"O": OUTSIDE}


def may_follow(scheme: str | None, before: Tag | None, after: Tag | None) -> bool:
    """Whether a tag may follow another; None is the border of the sentence."""
    is_open = before is not None and before.role in ("B", "I")  # the entity may continue
    same_entity = is_open and after is not None and before.type == after.type
    if scheme == "IOB2":  # every entity begins with B
        return after is None or after.role != "I" or same_entity
    if scheme == "IOB1":  # B only separates an entity from an entity of the same type before it
        return after is None or after.role != "B" or same_entity
    if scheme in ("IOBES", "BILOU", "BMES"):  # an open entity continues until E or L; only an open entity continues
        continues = after is not None and after.role in ("I", "E")
        return continues and same_entity if is_open else not continues
    return True


def default_scheme(labels: Iterable[str]) -> str | None:
    """Scheme of a task that was saved without one: IOB2 if the labels fit it, else None."""
    labels = [label for label in labels if label != "O"]
    split = [(label, "") if letters_alone(labels) else split_tag(label) for label in labels]
    iob2 = all(prefix in ("B", "I") and ("B", kind) in split for prefix, kind in split)
    return "IOB2" if iob2 else None


def letters_alone(labels: Sequence[str]) -> bool:
    """Whether the labels are bare prefixes (B, I …) of one scheme, without types."""
    return bool(labels) and any(set(labels) <= set(letters) for letters in LETTERS.values())


def reader_of_tags(labels: Sequence[str], scheme: str | None) -> Callable[[str], str]:
    """A function that rewrites a label for seqeval's default mode: O, B-X, I-X, E-X or S-X."""
    meaning = tags_of_labels(labels, scheme)
    written = {label: "O" if tag == OUTSIDE else f"{tag.role}-{tag.type}" for label, tag in meaning.items()}
    return written.__getitem__


def entity_spans(tags: Sequence[Tag]) -> list[tuple[str, int, int]]:
    """The type, first and last word of each entity, as seqeval's default mode reads tags (written O, B-X, I-X, …)."""
    spans: list[tuple[str, int, int]] = []
    before = OUTSIDE
    for word, tag in enumerate(tags):
        if tag.role in ("I", "E") and before.role in ("B", "I") and before.type == tag.type:
            spans[-1] = (tag.type, spans[-1][1], word)
        elif tag.role != "O":
            spans.append((tag.type, word, word))
        before = tag
    return spans
