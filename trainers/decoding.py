"""Decoding: find the best sequence of tags that the scheme allows, over a whole sentence.

In IOB2 an I-X only follows B-X or I-X, and the other schemes have similar rules. Taking the best tag of each word
alone sometimes breaks the rules, and a broken entity counts as wrong. The Viterbi algorithm (Viterbi 1967) finds the
best sequence that keeps the rules. They apply to sentences, so the scores of a sentence's windows are joined first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .tag_schemes import may_follow, tags_of_labels


class Rules(NamedTuple):
    """Which of C tags may begin a sentence (C,), follow another (C, C), and end a sentence (C,); all bool."""

    begin: np.ndarray
    follow: np.ndarray
    end: np.ndarray


def rules_of(labels: Sequence[str], scheme: str | None) -> Rules:
    """The rules of a scheme for a list of C labels."""
    meaning = tags_of_labels(labels, scheme)
    tags = [meaning[label] for label in labels]
    return Rules(
        np.array([may_follow(scheme, None, tag) for tag in tags]),
        np.array([[may_follow(scheme, before, after) for after in tags] for before in tags]),
        np.array([may_follow(scheme, tag, None) for tag in tags]),
    )


def decode(logits: np.ndarray, rules: Rules) -> np.ndarray:
    """The best sequence of tags that the rules allow: logits (W, C) → ids (W,), for W words.

    If the rules allow no sequence (one word in IOBES without O and S tags, say), each word gets its best tag.
    """
    best = logits.argmax(axis=-1)
    if not len(best) or (rules.begin[best[0]] and rules.end[best[-1]] and rules.follow[best[:-1], best[1:]].all()):
        return best
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    path = viterbi(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), rules)
    return best if path is None else path


def viterbi(scores: np.ndarray, rules: Rules) -> np.ndarray | None:
    """The best allowed sequence: log-probabilities (W, C) → ids (W,); None if no sequence is allowed."""
    begin, follow, end = (np.where(allowed, 0.0, -np.inf) for allowed in rules)
    total = scores[0] + begin
    came_from = []
    for score in scores[1:]:
        ways = total[:, None] + follow
        came_from.append(ways.argmax(axis=0))
        total = ways.max(axis=0) + score
    total = total + end
    if not np.isfinite(total.max()):
        return None
    path = [int(total.argmax())]
    for best in reversed(came_from):
        path.append(int(best[path[-1]]))
    return np.array(path[::-1])
