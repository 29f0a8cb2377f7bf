"""Viterbi decoding under IOB2 against every path there is."""

import itertools

import pytest
import torch

from trainers.decoding import IGNORED, best_labels, iob2_transitions, viterbi

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def is_legal(path: tuple[int, ...]) -> bool:
    """IOB2, written out: an I-X stands only behind B-X or I-X."""
    before = "O"
    for tag in (NAMES[i] for i in path):
        if tag.startswith("I-") and before[1:] != tag[1:]:
            return False
        before = tag
    return True


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("words", [1, 2, 4])
def test_viterbi_finds_the_best_legal_path(seed, words):
    torch.manual_seed(seed)
    scores = torch.randn(words, len(NAMES), dtype=torch.float64).log_softmax(dim=-1)
    paths = [p for p in itertools.product(range(len(NAMES)), repeat=words) if is_legal(p)]
    best = max(paths, key=lambda path: sum(float(scores[w, tag]) for w, tag in enumerate(path)))
    assert tuple(viterbi(scores, iob2_transitions(NAMES)).tolist()) == best


def test_rows_are_decoded_at_their_words_and_broken_entities_are_mended():
    logits = torch.full((1, 4, 5), -5.0)
    labels = torch.tensor([[IGNORED, 0, IGNORED, 0]])
    logits[0, 0, 4] = logits[0, 2, 4] = 5.0  # not words: their own best tag, whatever the rule
    logits[0, 1, 0] = 5.0
    logits[0, 3, 2], logits[0, 3, 1] = 5.0, 4.0  # I-LOC behind O is not allowed, B-LOC comes next
    assert best_labels(NAMES)(logits, labels).tolist() == [[4, 0, 4, 1]]
    assert logits.argmax(dim=-1).tolist() == [[4, 0, 4, 2]], "the example shows nothing"


@pytest.mark.parametrize("names", [["O", "PER"], ["O", "I-PER", "B-LOC"], ["O", "B-PER", "L-PER"]])
def test_other_schemes_take_each_best_tag(names):
    assert iob2_transitions(names).all()
    logits = torch.randn(2, 3, len(names))
    assert torch.equal(best_labels(names)(logits, torch.zeros(2, 3, dtype=torch.long)), logits.argmax(dim=-1))
