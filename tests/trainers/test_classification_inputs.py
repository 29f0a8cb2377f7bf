"""Encoded texts and pairs, and both scores against plain counts."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, EvalPrediction

from modeling_unihyperlora.errors import ConfigError
from trainers.classification_data import Example
from trainers.classification_inputs import EncodedTexts, best_class
from trainers.metrics import classification_scores

LABELS = ["no", "yes"]


def encoded(tokenizer, *texts, length: int = 16, labels=LABELS) -> EncodedTexts:
    rows = [(text, None) if isinstance(text, str) else text for text in texts]
    examples = [Example(*row, labels and labels[i % 2], "here") for i, row in enumerate(rows)]
    return EncodedTexts(examples, tokenizer, LABELS, length)


def tokens_of(tokenizer, row) -> list[str]:
    return tokenizer.convert_ids_to_tokens(row["input_ids"])


def test_a_text_and_its_label(tokenizer):
    data = encoded(tokenizer, "Anna works", "")
    assert tokens_of(tokenizer, data[0]) == ["[CLS]", "anna", "works", "[SEP]"]
    assert tokens_of(tokenizer, data[1]) == ["[CLS]", "[SEP]"]
    assert [row["labels"] for row in data] == [0, 1]
    batch = DataCollatorWithPadding(tokenizer)(list(data))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]


def test_a_pair_is_encoded_as_the_host_reads_pairs(tokenizer):
    (row,) = encoded(tokenizer, ("anna works", "in rome"))
    assert tokens_of(tokenizer, row) == ["[CLS]", "anna", "works", "[SEP]", "in", "rome", "[SEP]"]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("pair", "length", "kept"),
    [
        (("anna", "a b c d e f g"), 8, (1, 4)),  # the short text is kept whole
        (("a b c d e f g", "anna"), 8, (4, 1)),
        (("a b c d e f", "a b c d e f"), 9, (3, 3)),
        (("a b c", "a b c"), 5, (1, 1)),
    ],
)
def test_the_longer_text_is_cut_first(tokenizer, pair, length, kept):
    (row,) = encoded(tokenizer, pair, length=length)
    assert len(row["input_ids"]) == length
    separator = tokens_of(tokenizer, row).index("[SEP]")
    assert (separator - 1, length - separator - 2) == kept


def test_what_is_cut_is_counted_in_a_warning(tokenizer, caplog):
    encoded(tokenizer, "anna works in rome", "anna", "rome", length=6)
    assert not caplog.records
    encoded(tokenizer, "anna works in rome", "anna", "a b c d e f", length=5)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("2 of 3 texts are longer than 5 sub-tokens and are cut at the end")


def test_no_room(tokenizer):
    encoded(tokenizer, "anna", length=3)
    with pytest.raises(ConfigError, match="max_seq_length=2 leaves no room for a text beside 2 special"):
        encoded(tokenizer, "anna", length=2)
    with pytest.raises(ConfigError, match="max_seq_length=4 leaves no room for a text beside 3 special"):
        encoded(tokenizer, ("anna", "ben"), length=4)


def test_unknown_labels_and_lines(tokenizer):
    data = encoded(tokenizer, "anna", "ben", labels=None)
    assert "labels" not in data[0]
    rows = data.rows_of(np.array([1, 0]))
    assert [row["label"] for row in rows] == ["yes", "no"]


def test_the_best_class():
    logits = torch.tensor([[0.1, 0.2, -1.0], [3.0, 2.0, 1.0]])
    assert best_class(logits, None).tolist() == best_class((logits, "states"), None).tolist() == [1, 0]


def by_hand(gold: list[int], found: list[int]) -> dict[str, float]:
    """Accuracy, and the mean of 2·TP / (2·TP + FP + FN) over the classes that occur on either side."""
    scores = []
    for label in set(gold) | set(found):
        true = sum(g == f == label for g, f in zip(gold, found, strict=True))
        wrong = sum((g == label) != (f == label) for g, f in zip(gold, found, strict=True))
        scores.append(2 * true / (2 * true + wrong))
    hits = sum(g == f for g, f in zip(gold, found, strict=True))
    return {"accuracy": hits / len(gold), "f1": sum(scores) / len(scores)}


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_are_those_of_plain_counts(classes):
    generator = np.random.default_rng(classes)
    for size in (1, 5, 200):
        gold, found = (generator.integers(0, classes, size) for _ in range(2))
        scores = classification_scores(EvalPrediction(predictions=found, label_ids=gold))
        assert scores == pytest.approx(by_hand(gold.tolist(), found.tolist()), abs=1e-12)


def test_macro_f1_counts_classes_and_not_texts():
    gold, found = [0] * 9 + [1], [0] * 10  # always the frequent class
    scores = classification_scores(EvalPrediction(predictions=np.array(found), label_ids=np.array(gold)))
    assert scores == pytest.approx({"accuracy": 0.9, "f1": (18 / 19 + 0) / 2})
