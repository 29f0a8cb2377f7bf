"""Tagging and classifying texts: equal to a run's predictions and to a plain forward pass in float64."""

import json

import numpy as np
import pytest
import torch

from modeling_unihyperlora import ConfigError, DataError, UniHyperLoraForSequenceClassification
from modeling_unihyperlora.words import begins_of, prepare_tokenizer, vocabulary_flags, word_rules
from tests.modeling_unihyperlora.small_streams import MOODS, TOKENIZER, bert, small_stream, text
from tests.tokenizer_kinds import KINDS, LINES, make_tokenizer
from trainers.running import run
from trainers.tagging import classify, tag, words_of
from trainers.tasks import NER

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def tagger():
    model = small_stream(labels=LABELS)
    model.config.tasks["people"]["scheme"] = "IOB2"
    return model


@pytest.fixture(scope="module")
def classifier():
    return small_stream(labels=MOODS, task="moods", cls=UniHyperLoraForSequenceClassification)


def softmax(logits: torch.Tensor) -> np.ndarray:
    return logits.detach().double().softmax(dim=-1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_of_raw_text_are_those_that_a_tokenizer_makes(kind):
    tokenizer = prepare_tokenizer(make_tokenizer(kind))
    for line in [*LINES[:5], " Al-Ain\t(don't)  pay $5! ", "", "  "]:
        ids = tokenizer(line, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
        made = 0 if ids.shape[1] == 0 else int(begins_of(word_rules(vocabulary_flags(tokenizer)), ids)[0].sum())
        assert len(words_of(line)) == made
        given = [line[start:end] for start, end in words_of(line)]
        assert "".join(given) == "".join(line.split())


def test_tags_are_those_that_a_run_predicts(tagger, tmp_path):
    """Also for texts longer than the host's window, and for texts without words."""
    sentences = [*text(1, 5), sum(text(2, 30), []), [], ["word1"]]
    rows = [json.dumps({"tokens": words}) + "\n" for words in sentences]
    (tmp_path / "test.jsonl").write_text("".join(rows))
    bert().save_pretrained(tmp_path / "host")
    TOKENIZER.save_pretrained(tmp_path / "host")
    tagger.save_pretrained(tmp_path / "adapter")
    where = ["--adapter", tmp_path / "adapter", "--model_name_or_path", tmp_path / "host", "--output_dir", tmp_path]
    flags = ["--do_predict", "--test_file", tmp_path / "test.jsonl", "--use_cpu", "--disable_tqdm", "true"]
    run(NER, [*map(str, where + flags)])
    predicted = [line.split() for line in (tmp_path / "predictions.txt").read_text().split("\n")[:-1]]
    found = tag(tagger, sentences, batch_size=3)
    assert [one.tags for one in found] == predicted and [one.words for one in found] == sentences
    assert len({*sum(predicted, [])}) > 2  # of a tagger that says the same of each word it would be easy


def test_entities_are_where_their_words_are(tagger):
    line = "word1 word2,word3  word4 word5 word6 word7 word8"
    [found] = tag(tagger, [line])
    [logits] = tagger(**TOKENIZER([found.words], is_split_into_words=True, return_tensors="pt")).logits
    probability = softmax(logits)[1:-1]
    assert found.words == ["word1", "word2", ",", "word3", "word4", "word5", "word6", "word7", "word8"]
    assert found.entities
    at = 0
    for entity in found.entities:
        words = [n for n, (start, _) in enumerate(words_of(line)) if entity.start <= start < entity.end]
        assert entity.text == line[entity.start : entity.end] and entity.start >= at
        assert [found.tags[n][0] for n in words] == ["B"] + ["I"] * (len(words) - 1)
        assert {found.tags[n][2:] for n in words} == {entity.type}
        of_tags = [probability[n, LABELS.index(found.tags[n])] for n in words]
        assert entity.score == pytest.approx(np.mean(of_tags), abs=1e-6)
        at = entity.end
    covered = sum(len(words_of(entity.text)) for entity in found.entities)
    assert covered == sum(label != "O" for label in found.tags)


def test_given_words_are_kept_and_joined_by_blanks(tagger):
    words = ["word1", "(word2)", "word3", "word4", "word5"]
    [found] = tag(tagger, [words])
    assert found.text == "word1 (word2) word3 word4 word5" and found.words == words
    assert all(entity.text == found.text[entity.start : entity.end] for entity in found.entities)


def test_neither_the_batch_nor_its_order_matters(tagger):
    texts = [" ".join(words[: 1 + number % 8]) for number, words in enumerate(text(3, 20))]
    together, alone = tag(tagger, texts, batch_size=7), [tag(tagger, [one])[0] for one in texts]
    assert [one.tags for one in together] == [one.tags for one in alone]


def test_texts_without_a_word_have_nothing(tagger):
    assert [one.entities for one in tag(tagger, ["", "  ", "word1"])][:2] == [[], []]
    assert [(one.text, one.words, one.tags) for one in tag(tagger, ["", " "])] == [("", [], []), (" ", [], [])]
    assert tag(tagger, []) == []


def test_classes_are_those_of_a_plain_pass(classifier):
    texts = [" ".join(words) for words in text(4, 9)]
    for one, found in zip(texts, classify(classifier, texts, batch_size=4), strict=True):
        [expected] = softmax(classifier(**classifier.stream.words.tokenizer([one], return_tensors="pt")).logits)
        assert list(found.scores) == MOODS and found.text == one
        assert list(found.scores.values()) == pytest.approx(expected, abs=1e-5)
        assert found.label == MOODS[expected.argmax()] and found.score == max(found.scores.values())


def test_pairs_are_classified(classifier):
    [found], [first] = classify(classifier, [("word1", "word2")]), classify(classifier, ["word1"])
    assert found.scores != first.scores
    assert classify(classifier, []) == []


def test_what_cannot_be_classified_is_refused(classifier, tagger):
    with pytest.raises(DataError, match="Text 2 of 2 is empty"):
        classify(classifier, ["word1", " "])
    with pytest.raises(DataError, match="Some texts are pairs"):
        classify(classifier, ["word1", ("word1", "word2")])
    with pytest.raises(ConfigError, match="leaves no room"):
        tag(tagger, ["word1"], max_seq_length=2)
