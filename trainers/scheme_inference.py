"""Infers the tag scheme from the training sentences.

Label names do not determine the scheme: both IOB1 and IOB2 have B-PER and I-PER. Only the order of the tags shows
whether I-PER may begin an entity.
"""

import logging
import re
from collections.abc import Iterable, Sequence

from modeling_unihyperlora.configuration_unihyperlora import TAG_SCHEMES
from modeling_unihyperlora.errors import DataError

from .reading import listed
from .tag_schemes import LETTERS, ROLES, letters_alone, may_follow, split_tag, tags_of_labels

logger = logging.getLogger(__name__)

_LIKE_O = ("0", "o", "_", "-", "*")
_LOOKALIKES = (  # forms that resemble PREFIX-TYPE
    re.compile(r"(?P<prefix>[BIMESLU])[_:/.|](?P<type>.*)"),
    re.compile(r"(?P<prefix>[BIMESLU])-(?P<type>)"),
    re.compile(r"(?P<prefix>[bimeslu])[-_:/.|](?P<type>.*)"),
    re.compile(r"(?P<type>.+)[-_:/.|](?P<prefix>[BIMESLU])"),
)


def infer_scheme(
    sequences: Sequence[tuple[str, Sequence[str]]], labels: Sequence[str], stated: str | None = None
) -> str:
    """Infer the scheme from the tags of the training sentences; warns if some tags break its rules.

    Args:
        sequences: origin and tags of each sentence.
        labels: all labels of the task, including unused ones.
        stated: scheme given by the user, or None.

    Returns:
        One of ``TAG_SCHEMES``.

    Raises:
        DataError: the prefixes belong to no scheme or not to the stated one, or the tags only resemble prefixes.
    """
    if stated is not None and stated not in TAG_SCHEMES:
        raise DataError(f"The tag scheme {stated!r} is unknown. Choose one of {', '.join(TAG_SCHEMES)}.")
    used = sorted({tag for _, tags in sequences for tag in tags} - {"O"})
    if not used:
        declared = [label for label in labels if label != "O"]
        used = [label for label in declared if split_tag(label)[0]] or declared
    known = sorted({*used, *labels})
    candidates = _candidates(used, known, stated)
    broken = {scheme: count_broken(sequences, known, scheme) for scheme in candidates}
    scheme = min(candidates, key=lambda name: broken[name][0])  # the first if several are equal
    count, where = broken[scheme]
    if count:
        logger.warning(
            "The tags are read as %s, whose rules are broken %d times, first in %s. Correct the tags, or give "
            "--tag_scheme if they follow another scheme.",
            scheme,
            count,
            where,
        )
    return scheme


def count_broken(
    sequences: Iterable[tuple[str, Sequence[str]]], labels: Sequence[str], scheme: str
) -> tuple[int, str]:
    """Number of tags that break the rules of a scheme, and the origin of the first one."""
    meaning = tags_of_labels(labels, scheme)
    count, first = 0, ""
    allowed: dict[tuple[str | None, str | None], bool] = {}
    for where, tags in sequences:
        for pair in zip([None, *tags], [*tags, None], strict=True):
            if pair not in allowed:
                allowed[pair] = may_follow(scheme, *(None if tag is None else meaning[tag] for tag in pair))
            if not allowed[pair]:
                count, first = count + 1, first or where
    return count, first


def _candidates(used: list[str], labels: list[str], stated: str | None) -> list[str]:
    """Schemes that have all prefixes of these tags, the most likely first; only the stated scheme if one is stated.

    Raises:
        DataError: no scheme fits, or the stated one does not.
    """
    alone = letters_alone([label for label in labels if label != "O"])
    prefixed = used if alone else [tag for tag in used if split_tag(tag)[0]]
    if not prefixed or (stated == "IO" and len(prefixed) < len(used)):
        if stated not in (None, "IO"):
            raise DataError(f"The tags {listed(used)} have no prefix, so they are not {stated}. Their scheme is IO.")
        if stated is None:
            _check_bare(used)
        return ["IO"]
    _check_prefixed(used, prefixed)
    letters = {label if alone else split_tag(label)[0] for label in labels} & {*ROLES}
    if letters == {"I"}:
        candidates = ["IO", "IOB1"]
    elif "B" not in letters and letters & {"I", "M", "E", "L"}:
        candidates = []  # such as IOE
    else:
        size = min((len(own) for own in LETTERS.values() if letters <= {*own}), default=0)
        candidates = [name for name, own in LETTERS.items() if letters <= {*own} and len(own) == size]
    if not candidates or stated not in (None, *candidates):
        raise DataError(
            f"The tags {listed(used)} with the prefixes {', '.join(sorted(letters))} are not of "
            f"{'the scheme ' + stated if stated else 'a known scheme'}. Known schemes: IOB1 and IOB2 (B, I), IOBES "
            "(B, I, E, S), BILOU (B, I, L, U), BMES (B, M, E, S) and IO (I only, or types without a prefix)."
        )
    return candidates if stated is None else [stated]


def _check_prefixed(used: Sequence[str], prefixed: Sequence[str]) -> None:
    """Raise ``DataError`` if some tags have a prefix and others have none, or if a tag has two prefixes."""
    bare = [tag for tag in used if tag not in prefixed]
    if bare:
        raise DataError(
            f"The tag '{bare[0]}' has no prefix, '{prefixed[0]}' has one. Give each tag a prefix (B-{bare[0]}, "
            f"I-{bare[0]}), write O outside entities, or give --tag_scheme IO if all tags are bare types."
        )
    types = {kind for _, kind in map(split_tag, used)}
    for tag in used:
        inner = split_tag(split_tag(tag)[1])
        if inner[0] and inner[1] in types:
            raise DataError(
                f"The tag '{tag}' has two prefixes: its type would be '{'-'.join(inner)}', and there is a type "
                f"'{inner[1]}'. Give it one prefix: {inner[0]}-{inner[1]} or {split_tag(tag)[0]}-{inner[1]}."
            )


def _check_bare(used: Sequence[str]) -> None:
    """Raise ``DataError`` if bare types look like ids, like O, or like prefixed tags in another form."""
    if all(map(str.isdecimal, used)):
        raise DataError(
            f"The tags are numbers written as text ({listed(map(repr, used))}), so that 0 would be an entity too. "
            "Write numbers without quotation marks in JSON lines and name them with --tag_names O B-PER I-PER …; or "
            "give --tag_scheme IO if each number is the name of a type."
        )
    entities = [tag for tag in used if tag != "o"]
    for lookalike in _LOOKALIKES:
        found = [lookalike.fullmatch(tag) for tag in entities]
        if found and all(found):
            tag, match = entities[0], found[0]
            meant = "-".join(filter(None, (match["prefix"].upper(), match["type"])))
            raise DataError(
                f"The tag '{tag}' looks like {meant} in another form, and so do the other tags. Write prefix, hyphen, "
                f"type ({meant}), and O outside entities. Or give --tag_scheme IO if '{tag}' is the name of a type."
            )
    if none := [tag for tag in used if tag in _LIKE_O]:
        raise DataError(
            f"The tag {none[0]!r} seems to mean no entity, but would be read as an entity of that type. Write O "
            f"outside entities; or give --tag_scheme IO if {none[0]!r} is the name of a type."
        )
