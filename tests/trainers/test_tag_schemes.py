"""Tag schemes: inferred from sequences, each with its own rules; scores against entities counted by hand."""

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from transformers import EvalPrediction

from modeling_unihyperlora.errors import DataError
from trainers.decoding import rules_of
from trainers.metrics import entity_scores
from trainers.ner_data import Sentence
from trainers.ner_windows import IGNORED, SentenceWindows
from trainers.scheme_inference import count_broken, infer_scheme
from trainers.tag_schemes import OUTSIDE, Tag, default_scheme, entity_spans, split_tag

TEXTS = {  # the same two sentences: two places side by side, a person of three words, a place of one
    "IOB1": ["I-LOC B-LOC O I-PER I-PER I-PER", "O I-LOC"],
    "IOB2": ["B-LOC B-LOC O B-PER I-PER I-PER", "O B-LOC"],
    "IOBES": ["S-LOC S-LOC O B-PER I-PER E-PER", "O S-LOC"],
    "BILOU": ["U-LOC U-LOC O B-PER I-PER L-PER", "O U-LOC"],
    "BMES": ["S-LOC S-LOC O B-PER M-PER E-PER", "O S-LOC"],
}
ENTITIES = [{("LOC", 0, 1), ("LOC", 1, 2), ("PER", 3, 6)}, {("LOC", 1, 2)}]


def sequences(*lines: str) -> list[tuple[str, list[str]]]:
    return [(f"line {number}", line.split()) for number, line in enumerate(lines, 1)]


def labels_of(lines: list[str]) -> list[str]:
    return sorted({tag for line in lines for tag in line.split()} | {"O"})


def entities(tags: list[str], scheme: str) -> set[tuple[str, int, int]]:
    """(type, first word, end) of the entities of a legal sequence, without the package's code."""
    found, start = set(), None
    for at, tag in enumerate([*tags, "O"]):
        letter, _, kind = tag.partition("-") if scheme != "types" else ("I" if tag != "O" else "O", "", tag)
        before = None if start is None else start[0]
        begins = {
            "IOB1": letter == "B" or (letter == "I" and kind != before),
            "IOB2": letter == "B",
            "IOBES": letter in ("B", "S"),
            "BILOU": letter in ("B", "U"),
            "BMES": letter in ("B", "S"),
            "IO": letter == "I" and kind != before,
            "types": letter == "I" and kind != before,
        }[scheme]
        if start is not None and (begins or letter == "O"):
            found.add((start[0], start[1], at))
            start = None
        if begins:
            start = (kind, at)
    return found


# ---- inference ----


@pytest.mark.parametrize("scheme", TEXTS)
def test_the_scheme_is_seen_in_the_sequences(scheme, caplog):
    lines = TEXTS[scheme]
    assert infer_scheme(sequences(*lines), labels_of(lines)) == scheme
    assert [entities(line.split(), scheme) for line in lines] == ENTITIES
    assert not caplog.records


@pytest.mark.parametrize(
    ("lines", "labels", "expected"),
    [
        (["I-PER I-PER O I-LOC"], "O I-LOC I-PER", "IO"),  # nothing stands side by side
        (["I-PER I-PER O I-LOC"], "O B-LOC I-LOC B-PER I-PER", "IOB1"),  # declared, and not used
        (["B-PER O B-LOC"], "O B-LOC B-PER", "IOB2"),
        (["O O"], "O B-PER I-PER", "IOB2"),  # nothing to see
        (["PER PER O LOC"], "O LOC PER", "IO"),
        (["NOUN VERB ."], ". NOUN VERB", "IO"),
        (["B I O B B"], "O B I", "IOB2"),
        (["I I O I B"], "O B I", "IOB1"),
        (["B I E O S"], "O B I E S", "IOBES"),
        (["B L O U"], "O B L U", "BILOU"),
        (["A B C O"], "O A B C", "IO"),  # types that happen to be letters
        (["B-E-mail I-E-mail O"], "O B-E-mail I-E-mail", "IOB2"),
        (["B-B-ORG I-B-ORG"], "O B-B-ORG I-B-ORG", "IOB2"),
        (["T_cell B_cell O"], "O T_cell B_cell", "IO"),
        (["S-PER O"], "O S-PER", "IOBES"),
        (["O O"], "O <PAD> B-PER I-PER", "IOB2"),
    ],
)
def test_odd_label_sets(lines, labels, expected):
    assert infer_scheme(sequences(*lines), labels.split()) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("B_PER I_PER O", "'B_PER' looks like B-PER .* Write prefix, hyphen, type"),
        ("PER-B PER-I O", "'PER-B' looks like B-PER"),
        ("PER_B LOC_I", "'LOC_I' looks like I-LOC"),
        ("b-per i-per o", "'b-per' looks like B-per"),
        ("B:PER", "'B:PER' looks like B-PER"),
        ("B- I- O", "'B-' looks like B in"),
        ("B-ORG I-B-ORG", "'I-B-ORG' has two prefixes: .*Give it one prefix: B-ORG or I-ORG"),
        ("B-PER I-PER MISC", "'MISC' has no prefix, 'B-PER' has one"),
        ("B-PER 0", "'0' has no prefix"),
        ("1 0 0 2", "numbers written as text .*'0', '1', '2'.*--tag_names"),
        ("PER 0 0", "'0' seems to mean no entity, .* Write O"),
        ("PER o", "'o' seems to mean no entity"),
        ("(PERSON* *) *", r"'\*' seems to mean no entity"),
        ("B-PER I-PER E-PER L-PER", "B, E, I, L are not of a known scheme"),
        ("I-PER E-PER", "E, I are not of a known scheme"),
        ("S-PER U-PER", "not of a known scheme"),
    ],
)
def test_what_only_looks_like_a_scheme_is_named(line, expected):
    with pytest.raises(DataError, match=expected):
        infer_scheme(sequences(line), sorted({*line.split(), "O"}))


def test_a_stated_scheme():
    mixed = sequences("E-mail PER O")
    assert infer_scheme(mixed, ["O", "E-mail", "PER"], "IO") == "IO"
    assert infer_scheme(sequences("1 0"), ["0", "1"], "IO") == infer_scheme(sequences("X *"), ["X", "*"], "IO") == "IO"
    assert infer_scheme(sequences("HEPATITIS-B O"), ["O", "HEPATITIS-B"], "IO") == "IO"
    assert infer_scheme(sequences("I-PER O"), ["O", "I-PER"], "IOB1") == "IOB1"
    assert infer_scheme(sequences("B-PER O"), ["O", "B-PER", "I-PER"], "IOB1") == "IOB1"
    with pytest.raises(DataError, match="not of the scheme IO. Known schemes"):
        infer_scheme(sequences("B-PER O"), ["O", "B-PER"], "IO")
    with pytest.raises(DataError, match="not of the scheme IOBES"):
        infer_scheme(sequences("B-PER O"), ["O", "B-PER"], "IOBES")
    with pytest.raises(DataError, match="have no prefix, so they are not IOB2"):
        infer_scheme(sequences("PER O"), ["O", "PER"], "IOB2")
    with pytest.raises(DataError, match="'IOB3' is unknown. Choose one of IOB1, IOB2"):
        infer_scheme(mixed, ["O"], "IOB3")


def test_a_few_broken_sentences_are_counted(caplog):
    lines = ["B-PER I-PER O B-PER"] * 3 + ["O I-PER O I-PER"]
    with caplog.at_level(logging.WARNING):
        assert infer_scheme(sequences(*lines), labels_of(lines)) == "IOB2"
    assert "read as IOB2, whose rules are broken 2 times, first in line 4" in caplog.text
    assert count_broken(sequences(*lines), labels_of(lines), "IOB1") == (6, "line 1")


def test_names_alone_tell_little():
    assert default_scheme(["O", "B-PER", "I-PER"]) == default_scheme(["O", "B", "I"]) == "IOB2"
    assert default_scheme(["O", "B-PER", "I-LOC"]) is None  # no B-LOC: not IOB2
    assert default_scheme(["O", "PER"]) is None


def test_tags_are_split_at_their_first_hyphen():
    assert split_tag("B-E-mail") == ("B", "E-mail")
    assert (split_tag("M-X"), split_tag("PER"), split_tag("O")) == (("M", "X"), ("", "PER"), ("", "O"))


# ---- rules and scores ----


ALPHABETS = {scheme: labels_of(lines + ["I-LOC"] * (scheme == "IOB2")) for scheme, lines in TEXTS.items()}
ALPHABETS |= {
    "IOB1": ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"],
    "IO": ["O", "I-LOC", "I-PER"],
    "types": ["O", "LOC", "PER"],
}
LEGAL = {  # written out for entities of up to three words; one after the other, with O between them at will
    "IOB2": ["B I I", "B I", "B"],
    "IOBES": ["B I E", "B E", "S"],
    "BILOU": ["B I L", "B L", "U"],
    "BMES": ["B M E", "B E", "S"],
}


@pytest.mark.parametrize("scheme", LEGAL)
def test_the_rules_allow_exactly_the_legal_sequences(scheme):
    letters = sorted({letter for entity in LEGAL[scheme] for letter in entity.split()})
    labels = ["O", *(f"{letter}-{kind}" for kind in ("A", "C") for letter in letters)]
    pieces = [["O"], *([f"{x}-{kind}" for x in entity.split()] for entity in LEGAL[scheme] for kind in "AC")]
    legal = {
        tuple(itertools.chain(*parts))
        for count in (1, 2, 3)
        for parts in itertools.product(pieces, repeat=count)
        if sum(map(len, parts)) == 3
    }
    rules = rules_of(labels, scheme)

    def allowed(path: tuple[int, ...]) -> bool:
        inside = all(rules.follow[pair] for pair in itertools.pairwise(path))
        return rules.begin[path[0]] and rules.end[path[-1]] and inside

    paths = [path for path in itertools.product(range(len(labels)), repeat=3) if allowed(path)]
    assert {tuple(labels[number] for number in path) for path in paths} == legal


@pytest.mark.parametrize("scheme", ALPHABETS)
def test_scores_are_those_of_entities_counted_by_hand(tokenizer, scheme):
    """Random logits are decoded with the scheme, and a separate routine counts the entities of both sides."""
    labels, name = ALPHABETS[scheme], "IO" if scheme == "types" else scheme
    generator, rules = np.random.default_rng(0), rules_of(labels, name)
    legal = [
        path
        for path in itertools.product(range(len(labels)), repeat=4)
        if rules.begin[path[0]] and rules.end[path[-1]] and rules.follow[path[:-1], path[1:]].all()
    ]
    gold = [[labels[number] for number in legal[at]] for at in generator.integers(0, len(legal), 60)]
    sentences = [Sentence(["anna"] * 4, tags, "here") for tags in gold]
    windows = SentenceWindows(sentences, tokenizer, labels, 16, name)
    logits = generator.normal(size=(60, 6, len(labels)))
    for row, tags in enumerate(gold):
        for word, tag in enumerate(tags):
            logits[row, 1 + word, labels.index(tag)] += 2
    found = windows.tags_of(logits)
    true = {(row, *entity) for row, tags in enumerate(gold) for entity in entities(tags, scheme)}
    mine = {(row, *entity) for row, tags in enumerate(found) for entity in entities(tags, scheme)}
    assert not count_broken([("x", tags) for tags in found], labels, name)[0]
    right = len(true & mine)
    assert 0 < right < len(true)
    label_ids = np.array([row["labels"] for row in windows])
    assert (label_ids != IGNORED).sum() == 240
    scores = entity_scores(windows, by_type=True)(EvalPrediction(logits, label_ids))
    assert scores["precision"] == pytest.approx(right / len(mine))
    assert scores["recall"] == pytest.approx(right / len(true))
    assert scores["f1"] == pytest.approx(2 * right / (len(mine) + len(true)))
    assert scores["PER_number"] == sum(entity[1] == "PER" for entity in true)


def test_letters_alone_are_one_type(tokenizer):
    labels = ["O", "B", "I"]
    windows = SentenceWindows([Sentence(["anna"] * 4, "B I B O".split(), "x")], tokenizer, labels, 16, "IOB2")
    logits = np.eye(3)[[[0, 1, 2, 1, 0, 0]]] * 5
    label_ids = np.array([row["labels"] for row in windows])
    scores = entity_scores(windows, by_type=True)(EvalPrediction(logits, label_ids))
    assert (scores["f1"], scores["entity_number"]) == (1, 2)


@given(st.lists(st.tuples(st.sampled_from("OBIES"), st.sampled_from(["PER", "LOC"])), max_size=12))
def test_entities_are_those_of_seqeval(drawn):
    tags = [OUTSIDE if role == "O" else Tag(role, kind) for role, kind in drawn]
    written = ["O" if tag == OUTSIDE else f"{tag.role}-{tag.type}" for tag in tags]
    assert entity_spans(tags) == get_entities(written)
