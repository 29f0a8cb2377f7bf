"""Viterbi decoding with a scheme's rules, compared with all possible paths."""

import itertools

import numpy as np
import pytest
import torch

from trainers.decoding import decode, rules_of, viterbi
from trainers.ner_windows import token_scores

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def is_legal(path: tuple[int, ...], scheme: str) -> bool:
    """The rules written out: in IOB2 an I-X only follows B-X or I-X; in IOB1 a B-X does."""
    before, bound = "O", {"IOB2": "I-", "IOB1": "B-"}[scheme]
    for tag in (NAMES[i] for i in path):
        if tag.startswith(bound) and before[1:] != tag[1:]:
            return False
        before = tag
    return True


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("words", [1, 2, 4])
def test_the_best_legal_path_is_found(seed, words, scheme):
    logits = np.random.default_rng(seed).normal(size=(words, len(NAMES)))
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    paths = [p for p in itertools.product(range(len(NAMES)), repeat=words) if is_legal(p, scheme)]
    best = max(paths, key=lambda path: sum(float(scores[w, tag]) for w, tag in enumerate(path)))
    assert tuple(viterbi(scores, rules_of(NAMES, scheme)).tolist()) == best
    assert tuple(decode(logits.astype(np.float32), rules_of(NAMES, scheme)).tolist()) == best


def test_the_scheme_decides_and_not_the_names():
    logits, names = np.array([[5.0, -5, 6], [9, -5, 0]]), ["O", "B-PER", "I-PER"]
    decoded = {name: [names[number] for number in decode(logits, rules_of(names, name))] for name in ("IOB1", "IOB2")}
    assert decoded == {"IOB1": ["I-PER", "O"], "IOB2": ["O", "O"]}


def test_a_broken_entity_is_mended():
    logits = np.full((2, 5), -5.0)
    logits[0, 0] = logits[1, 2] = 5.0
    logits[1, 1] = 4.0  # I-LOC behind O is not allowed, B-LOC comes next
    assert decode(logits, rules_of(NAMES, "IOB2")).tolist() == [0, 1]
    assert logits.argmax(axis=-1).tolist() == [0, 2], "the example shows nothing"


def test_an_entity_is_ended_before_the_sentence_is():
    names = ["O", "B-X", "E-X", "S-X"]
    logits = np.array([[0.0, 3, 0, 2.9]])
    assert decode(logits, rules_of(names, "IOBES")).tolist() == [3]


@pytest.mark.parametrize("names", [["O", "PER"], ["O", "I-PER", "B-LOC"], ["O", "B-PER", "L-PER"]])
def test_without_a_scheme_each_word_gets_its_best_tag(names):
    rules = rules_of(names, None)
    assert rules.begin.all() and rules.follow.all() and rules.end.all()
    logits = np.random.default_rng(0).normal(size=(9, len(names)))
    assert np.array_equal(decode(logits, rules), logits.argmax(axis=-1))


def test_no_words_no_path_and_no_numbers():
    rules = rules_of(["B-X", "E-X"], "IOBES")  # one word cannot be tagged by the rules
    assert decode(np.zeros((0, 2)), rules).tolist() == []
    assert decode(np.array([[0.0, 1.0]]), rules).tolist() == [1]
    assert viterbi(np.array([[0.0, 1.0]]), rules) is None
    assert len(decode(np.full((3, 5), np.nan), rules_of(NAMES, "IOB2"))) == 3


def test_only_logits_are_kept():
    logits = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    for output in (logits, (logits, "states")):
        assert token_scores(output, None).dtype == torch.float32
