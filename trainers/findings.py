"""What is found in a text: entities or a class, from the scores of its words or of the text.

Torch is not needed: the scores may come from a model, or from ONNX files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, pre_tokenizers

from .decoding import decode, rules_of
from .tag_schemes import default_scheme, entity_spans, tags_of_labels


@dataclass(frozen=True)
class Entity:
    """An entity of a text: ``text[start:end]``, its type, and the mean probability of its words' tags."""

    text: str
    type: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class TaggedText:
    """A text, its words and the tag of each, and the entities that the tags make."""

    text: str
    words: list[str]
    tags: list[str]
    entities: list[Entity]


@dataclass(frozen=True)
class ClassifiedText:
    """A text, its likeliest class and the probability of every class."""

    text: str
    label: str
    scores: dict[str, float]

    @property
    def score(self) -> float:
        """The probability of ``label``."""
        return self.scores[self.label]


class WordCutter:
    """Finds the words of raw text.

    Args:
        cut: a regular expression for the places between two characters where a word begins without a blank
            (``modeling_unihyperlora.words.CUT``).
    """

    def __init__(self, cut: str):
        parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(cut), behavior="isolated")]
        self._words = pre_tokenizers.Sequence(parts)

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """Where the words are, (start, end) each; they are the words that every host's tokenizer makes."""
        return [span for _, span in self._words.pre_tokenize_str(text)]


class Tagger:
    """Decodes the scores of words by the rules of a tag scheme.

    Args:
        labels: names of the C tags.
        scheme: one of ``TAG_SCHEMES``; by default IOB2 where the labels are such.
    """

    def __init__(self, labels: Sequence[str], scheme: str | None):
        scheme = scheme or default_scheme(labels)
        self.labels = labels
        self._rules, self._meaning = rules_of(labels, scheme), tags_of_labels(labels, scheme)

    def __call__(self, text: str, places: Sequence[tuple[int, int]], logits: np.ndarray) -> TaggedText:
        """What is in a text with words at W places, from their scores (W, C)."""
        ids = decode(logits, self._rules)
        tags = [self.labels[number] for number in ids]
        sure = probabilities(logits)[np.arange(len(ids)), ids]
        entities = []
        for kind, first, last in entity_spans([self._meaning[tag] for tag in tags]):
            start, end = places[first][0], places[last][1]
            entities.append(Entity(text[start:end], kind, start, end, float(sure[first : last + 1].mean())))
        return TaggedText(text, [text[start:end] for start, end in places], tags, entities)


def classified(text: str, labels: Sequence[str], logits: np.ndarray) -> ClassifiedText:
    """The class of a text, from its scores (C,)."""
    scores = dict(zip(labels, probabilities(logits).tolist(), strict=True))
    return ClassifiedText(text, max(scores, key=scores.get), scores)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return raised / raised.sum(axis=-1, keepdims=True)
