"""Entities and classes of texts, from the logits of words or texts.

This module does not need torch: logits may come from a model or from ONNX files.
"""

from collections.abc import Callable, Iterable, Sequence
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
    """A text, its words, their tags, and the entities."""

    text: str
    words: list[str]
    tags: list[str]
    entities: list[Entity]


@dataclass(frozen=True)
class ClassifiedText:
    """A text, its most likely class, and the probability of every class."""

    text: str
    label: str
    scores: dict[str, float]

    @property
    def score(self) -> float:
        """Probability of ``label``."""
        return self.scores[self.label]


class WordCutter:
    """Finds the words of raw text.

    Args:
        cut: regular expression that matches the empty positions where a word begins without a blank
            (``modeling_unihyperlora.words.CUT``).
    """

    def __init__(self, cut: str):
        parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(cut), behavior="isolated")]
        self._words = pre_tokenizers.Sequence(parts)

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """Positions (start, end) of the words, which are the same as with every host's tokenizer."""
        return [span for _, span in self._words.pre_tokenize_str(text)]


class Tagger:
    """Decodes the logits of words with the rules of a tag scheme.

    Args:
        labels: names of the C tags.
        scheme: one of ``TAG_SCHEMES``; by default IOB2 if the labels fit it.
    """

    def __init__(self, labels: Sequence[str], scheme: str | None):
        scheme = scheme or default_scheme(labels)
        self.labels = labels
        self._rules, self._meaning = rules_of(labels, scheme), tags_of_labels(labels, scheme)

    def __call__(self, text: str, places: Sequence[tuple[int, int]], logits: np.ndarray) -> TaggedText:
        """Tags and entities of a text, from the positions of its W words and their logits (W, C)."""
        ids = decode(logits, self._rules)
        tags = [self.labels[number] for number in ids]
        sure = probabilities(logits)[np.arange(len(ids)), ids]
        entities = []
        for kind, first, last in entity_spans([self._meaning[tag] for tag in tags]):
            start, end = places[first][0], places[last][1]
            entities.append(Entity(text[start:end], kind, start, end, float(sure[first : last + 1].mean())))
        return TaggedText(text, [text[start:end] for start, end in places], tags, entities)


def classified(text: str, labels: Sequence[str], logits: np.ndarray) -> ClassifiedText:
    """Class of a text, from its logits (C,)."""
    scores = dict(zip(labels, probabilities(logits).tolist(), strict=True))
    return ClassifiedText(text, max(scores, key=scores.get), scores)


def in_batches(
    lengths: Sequence[int], batch_size: int, score: Callable[[list[int]], Iterable[np.ndarray]]
) -> list[np.ndarray]:
    """Results of each item, in order; items of similar length share a batch.

    Args:
        lengths: length of each item.
        batch_size: items of a batch.
        score: maps the numbers of a batch's items to their results.
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    found: list[np.ndarray] = [None] * len(lengths)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        for number, row in zip(numbers, score(numbers), strict=True):
            found[number] = row
    return found


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return raised / raised.sum(axis=-1, keepdims=True)
