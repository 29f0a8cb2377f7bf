"""Splits tagged words as raw text is split.

Data sets choose their own words: "U.S.", "1996-08-22" and "Al-Ain" are one word each in CoNLL. In raw text a word ends
at every mark (see ``words``). A reader that is trained only on a data set's words would meet unseen words in raw text,
so it is trained on both.
"""

from collections.abc import Iterator

from modeling_unihyperlora.words import cut_words

from .ner_data import Sentence
from .tag_schemes import Tag, tags_of_labels


def words_of_raw_text(sentences: list[Sentence], labels: list[str], scheme: str | None) -> list[Sentence]:
    """Sentences with words that raw text would split; returns them with the words and tags of raw text.

    An entity stays one entity: the first part of its first word begins it, and all other parts continue it.

    Args:
        sentences: words and their tags.
        labels: all labels of the task. A sentence is left out if its parts need a label that is not among them.
        scheme: scheme of the tags, see ``tag_schemes``.
    """
    meaning = tags_of_labels(labels, scheme)
    names = {tag: label for label, tag in meaning.items()}
    found = []
    for sentence in sentences:
        parts = [cut_words(word) or [word] for word in sentence.tokens]
        if sentence.tags is None or all(len(own) == 1 for own in parts):
            continue
        tags = [
            names.get(tag)
            for label, own in zip(sentence.tags, parts, strict=True)
            for tag in _tags_of_parts(meaning[label], len(own))
        ]
        if None not in tags:
            found.append(Sentence([part for own in parts for part in own], tags, sentence.origin))
    return found


def _tags_of_parts(tag: Tag, count: int) -> Iterator[Tag]:
    """Tags of the ``count`` parts of a word with this tag."""
    begins, ends = tag.role in ("B", "S"), tag.role in ("E", "S")
    for number in range(count):
        if tag.role == "O" or count == 1:
            yield tag
        elif begins and number == 0:
            yield tag._replace(role="B")
        else:
            yield tag._replace(role="E" if ends and number == count - 1 else "I")
