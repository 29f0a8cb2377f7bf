"""Tagged words as raw text would have them.

Who tags a sentence decides what its words are: "U.S.", "1996-08-22" and "Al-Ain" are one word each in CoNLL. In raw
text a word ends at every mark (see ``words``), so a reader that is trained on given words alone meets words there that
it has never seen. It is trained on both.
"""

from collections.abc import Iterator

from modeling_unihyperlora.words import CUT

from .findings import WordCutter
from .ner_data import Sentence
from .tag_schemes import Tag, tags_of_labels


def words_of_raw_text(sentences: list[Sentence], labels: list[str], scheme: str | None) -> list[Sentence]:
    """The sentences some of whose words raw text would cut, with the words and tags that they have in raw text.

    An entity stays one entity: the parts of its first word begin it, and the others go on with it.

    Args:
        sentences: words and their tags.
        labels: the tags that there are. A sentence is left out where they lack one that its parts would need.
        scheme: of the tags, see ``tag_schemes``.
    """
    meaning = tags_of_labels(labels, scheme)
    names = {tag: label for label, tag in meaning.items()}
    cut, found = WordCutter(CUT), []
    for sentence in sentences:
        parts = [[word[start:end] for start, end in cut(word)] or [word] for word in sentence.tokens]
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
    """The tags of the ``count`` parts of a word with this tag."""
    begins, ends = tag.role in ("B", "S"), tag.role in ("E", "S")
    for number in range(count):
        if tag.role == "O" or count == 1:
            yield tag
        elif begins and number == 0:
            yield tag._replace(role="B")
        else:
            yield tag._replace(role="E" if ends and number == count - 1 else "I")
