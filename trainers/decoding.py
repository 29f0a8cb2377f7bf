"""From scores to tags: the best sequence of tags that IOB2 allows.

In IOB2 an I-X only follows B-X or I-X. Taking each word's best tag on its own breaks that rule now and then, and a
broken entity is a wrong one; the Viterbi algorithm (Viterbi 1967) finds the best sequence that keeps it.
"""

from collections.abc import Callable

import torch

IGNORED = -100  # the label that cross-entropy and the scores skip


def best_labels(names: list[str]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``preprocess_logits_for_metrics`` for labels of these names.

    Returns:
        logits (B, T, C) and labels (B, T) → ids (B, T). Only where a label is not -100 stands a word; the tags of the
        words of a row are decoded together, the other positions get their own best id.
    """
    allowed = iob2_transitions(names)

    def decode(logits, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        best = logits.argmax(dim=-1)
        if not allowed.all():
            for row, words in enumerate(labels != IGNORED):
                if words.any():
                    best[row, words] = viterbi(logits[row, words].float().log_softmax(dim=-1), allowed)
        return best

    return decode


def iob2_transitions(names: list[str]) -> torch.Tensor:
    """(C + 1, C) bool: whether a tag may follow another; the last row is the beginning of a sentence.

    All is allowed where the names are not IOB2, that is where some I-X has no B-X or a prefix is another.
    """
    kinds = [("O", "") if name == "O" else tuple(name.split("-", 1)) for name in names]
    iob2 = all(len(kind) == 2 and kind[0] in "BIO" for kind in kinds)
    if not iob2 or any(("B", entity) not in kinds for prefix, entity in kinds if prefix == "I"):
        return torch.ones(len(names) + 1, len(names), dtype=torch.bool)
    rows = [
        [prefix != "I" or before in (("B", entity), ("I", entity)) for prefix, entity in kinds]
        for before in [*kinds, None]
    ]
    return torch.tensor(rows)


def viterbi(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Best allowed path: log-probabilities (W, C), transitions (C + 1, C) bool → ids (W,)."""
    penalty = torch.zeros(allowed.shape, device=scores.device).masked_fill(~allowed.to(scores.device), -torch.inf)
    total = scores[0] + penalty[-1]
    came_from = []
    for score in scores[1:]:
        total, best = (total[:, None] + penalty[:-1]).max(dim=0)
        total = total + score
        came_from.append(best)
    path = [total.argmax()]
    for best in reversed(came_from):
        path.append(best[path[-1]])
    return torch.stack(path[::-1])
