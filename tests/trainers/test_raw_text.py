"""Sentences with the words of raw text."""

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from modeling_unihyperlora.configuration_unihyperlora import TAG_SCHEMES
from modeling_unihyperlora.words import prepare_tokenizer
from tests.conftest import tiny_tokenizer
from trainers.ner_data import Sentence
from trainers.raw_text import words_of_raw_text
from trainers.scheme_inference import count_broken
from trainers.tag_schemes import reader_of_tags

LETTERS = {"IOB2": "BI", "IOB1": "BI", "IOBES": "BIES", "BILOU": "BILU", "BMES": "BMES", "IO": "I"}
WORDS = ["The", "U.S.", "beat", "Al-Ain", "Club", "3-1", "on", "1996-08-22", "naïve", "(", "東京", "."]
TAGGED = {
    "IOB2": "O B-LOC O B-ORG I-ORG O O O O O B-LOC O",
    "IOB1": "O I-LOC O I-ORG I-ORG O O O O O I-LOC O",
    "IOBES": "O S-LOC O B-ORG E-ORG O O O O O S-LOC O",
    "BILOU": "O U-LOC O B-ORG L-ORG O O O O O U-LOC O",
    "BMES": "O S-LOC O B-ORG E-ORG O O O O O S-LOC O",
    "IO": "O LOC O ORG ORG O O O O O LOC O",
}


def labels_of(scheme: str) -> list[str]:
    if scheme == "IO":
        return ["O", "LOC", "ORG"]
    return ["O", *(f"{letter}-{kind}" for kind in ("LOC", "ORG") for letter in LETTERS[scheme])]


@pytest.mark.parametrize("scheme", TAG_SCHEMES)
def test_an_entity_stays_one_in_every_scheme(scheme):
    labels, tags = labels_of(scheme), TAGGED[scheme].split()
    (found,) = words_of_raw_text([Sentence(WORDS, tags, "here")], labels, scheme)
    assert found.tokens[1:5] == ["U", ".", "S", "."] and "".join(found.tokens) == "".join(WORDS)
    assert count_broken([("here", found.tags)], labels, scheme)[0] == 0

    def entities(words: list[str], own: list[str]) -> list[tuple[str, str]]:
        read = reader_of_tags(labels, scheme)
        spans = get_entities([read(tag) for tag in own])
        return [(kind, "".join(words[first : last + 1])) for kind, first, last in spans]

    assert entities(found.tokens, found.tags) == entities(WORDS, tags)
    assert [kind for kind, _ in entities(WORDS, tags)] == ["LOC", "ORG", "LOC"]


def test_the_words_are_those_that_a_tokenizer_finds_in_the_text():
    (found,) = words_of_raw_text([Sentence(WORDS, ["O"] * len(WORDS), "here")], ["O"], "IOB2")
    backend = prepare_tokenizer(tiny_tokenizer()).backend_tokenizer
    text = backend.normalizer.normalize_str(" ".join(WORDS))
    assert len(found.tokens) == len([word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)])


@pytest.mark.parametrize(
    ("words", "tags", "labels"),
    [
        (["Anna", "lives", "here"], ["B-PER", "O", "O"], ["O", "B-PER", "I-PER"]),  # raw text has these very words
        (["Al-Ain"], ["B-LOC"], ["O", "B-LOC"]),  # no label for the parts that follow
        (["Al-Ain"], None, ["O", "B-LOC"]),
        ([], [], ["O"]),
    ],
)
def test_sentences_that_are_left_out(words, tags, labels):
    assert words_of_raw_text([Sentence(words, tags, "here")], labels, "IOB2") == []
