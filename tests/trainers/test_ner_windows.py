"""Windows: every word is scored once, whatever its length, and predictions come back sentence by sentence."""

import numpy as np
import pytest
from seqeval.metrics import f1_score
from transformers import EvalPrediction

from modeling_unihyperlora.errors import ConfigError, DataError
from trainers.ner_data import Sentence
from trainers.ner_windows import IGNORED, SentenceWindows, entity_scores

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
LONG_WORD = "supercalifragilistic"  # four pieces


def sentence(text: str, tags: str | None = None) -> Sentence:
    words = text.split()
    return Sentence(words, tags.split() if tags else ["O"] * len(words), "test, line 1")


def scored(windows: SentenceWindows) -> list[int]:
    """The labels that a loss would see, over all windows."""
    return [label for row in windows for label in row["labels"] if label != IGNORED]


def as_batch(rows: list[list[int]], fill: int) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [fill] * (width - len(row)) for row in rows])


def perfect_prediction(windows: SentenceWindows) -> EvalPrediction:
    rows = [row["labels"] for row in windows]
    return EvalPrediction(predictions=as_batch(rows, 0), label_ids=as_batch(rows, IGNORED))


def test_the_first_sub_token_has_the_label(tokenizer):
    windows = SentenceWindows([sentence(f"anna {LONG_WORD} rome", "B-PER O B-LOC")], tokenizer, LABELS, 16)
    (row,) = windows
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [
        "[CLS]", "anna", "super", "##cali", "##fragi", "##listic", "rome", "[SEP]"
    ]  # fmt: skip
    assert row["labels"] == [IGNORED, 3, 0, IGNORED, IGNORED, IGNORED, 1, IGNORED]
    assert row["attention_mask"] == [1] * 8


@pytest.mark.parametrize("length", [3, 4, 5, 6, 7, 9, 64])
def test_no_label_is_lost_at_any_length(tokenizer, length):
    generator = np.random.default_rng(length)
    choices = ["anna", "rome", LONG_WORD, "", "\x00", "\u200d", "unheard-of", "lives."]
    sentences = []
    for size in generator.integers(0, 30, 20):
        words = [str(word) for word in generator.choice(choices, size)]
        sentences.append(Sentence(words, [str(tag) for tag in generator.choice(LABELS, size)], "x"))
    windows = SentenceWindows(sentences, tokenizer, LABELS, length)
    assert all(len(row["input_ids"]) <= length for row in windows)
    assert [LABELS[label] for label in scored(windows)] == [tag for s in sentences for tag in s.tags]
    predicted = windows.tags_of(perfect_prediction(windows).predictions)
    assert predicted == [s.tags for s in sentences]


def test_windows_are_cut_between_words(tokenizer):
    windows = SentenceWindows([sentence(f"anna {LONG_WORD} lives in rome")], tokenizer, LABELS, 7)
    pieces = [tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1] for row in windows]
    assert pieces == [["anna", "super", "##cali", "##fragi", "##listic"], ["lives", "in", "rome"]]


def test_a_word_longer_than_the_window_is_cut_short(tokenizer):
    windows = SentenceWindows([sentence(f"anna {LONG_WORD} rome", "O B-PER B-LOC")], tokenizer, LABELS, 4)
    pieces = [tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1] for row in windows]
    assert pieces == [["anna"], ["super", "##cali"], ["rome"]]
    assert scored(windows) == [0, 3, 1]


def test_a_word_without_sub_tokens_is_unknown(tokenizer):
    (row,) = SentenceWindows([Sentence(["\x00", "", "rome"], ["B-PER", "I-PER", "O"], "x")], tokenizer, LABELS, 16)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "[UNK]", "[UNK]", "rome", "[SEP]"]
    assert row["labels"] == [IGNORED, 3, 4, 0, IGNORED]


def test_an_empty_sentence_has_an_empty_line(tokenizer):
    windows = SentenceWindows([sentence(""), sentence("rome", "B-LOC"), sentence("")], tokenizer, LABELS, 16)
    assert len(windows) == 1
    assert windows.tags_of([[0, 1, 0]]) == [[], ["B-LOC"], []]


def test_nothing_but_empty_sentences(tokenizer):
    with pytest.raises(DataError, match="not one sentence has a word"):
        SentenceWindows([sentence("")], tokenizer, LABELS, 16)


def test_no_room_for_a_word(tokenizer):
    with pytest.raises(ConfigError, match="max_seq_length=2"):
        SentenceWindows([sentence("rome")], tokenizer, LABELS, 2)


# ---- scores ----


def test_scores_are_those_of_whole_sentences(tokenizer):
    """An entity that a window border cuts counts once, as in the sentence."""
    sentences = [sentence("anna and ben flew to the rome", "B-PER I-PER I-PER O O B-LOC I-LOC")]
    windows = SentenceWindows(sentences, tokenizer, LABELS, 4)  # two words a window
    assert len(windows) == 4
    prediction = perfect_prediction(windows)
    assert entity_scores(windows)(prediction) == {"precision": 1, "recall": 1, "f1": 1, "accuracy": 1}
    prediction.predictions[1, 1] = 0  # the third word, inside the first entity
    scores = entity_scores(windows)(prediction)
    found = [["B-PER", "I-PER", "O", "O", "O", "B-LOC", "I-LOC"]]
    assert scores["f1"] == f1_score([sentences[0].tags], found) == 0.5
    assert scores["accuracy"] == pytest.approx(6 / 7)


def test_scores_by_type(tokenizer):
    windows = SentenceWindows([sentence("anna in rome", "B-PER O B-LOC")], tokenizer, LABELS, 16)
    prediction = perfect_prediction(windows)
    prediction.predictions[0, 3] = 0
    scores = entity_scores(windows, by_type=True)(prediction)
    assert (scores["PER_f1"], scores["LOC_f1"], scores["LOC_number"]) == (1, 0, 1)
    assert all(type(value) is float for value in scores.values())


def test_text_without_entities_scores_zero(tokenizer):
    windows = SentenceWindows([sentence("in the")], tokenizer, LABELS, 16)
    scores = entity_scores(windows, by_type=True)(perfect_prediction(windows))
    assert scores == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1}


@pytest.mark.parametrize(
    ("tags", "entities"),
    [("PER PER O LOC", 2), ("B-X L-X U-X U-X", 3), ("B-X E-X S-X S-X", 3), ("I-X I-X O I-Y", 2), ("B-X I-X B-X O", 2)],
)
def test_other_tag_schemes(tokenizer, tags, entities):
    labels = sorted(set(tags.split()) | {"O"})
    windows = SentenceWindows([sentence("anna anna anna anna", tags)], tokenizer, labels, 16)
    scores = entity_scores(windows, by_type=True)(perfect_prediction(windows))
    assert sum(value for name, value in scores.items() if name.endswith("_number")) == entities
    assert scores["f1"] == 1


def test_rows_out_of_order_are_refused(tokenizer):
    sentences = [sentence("anna", "B-PER"), sentence("rome", "B-LOC")]
    windows = SentenceWindows(sentences, tokenizer, LABELS, 16)
    prediction = perfect_prediction(windows)
    shuffled = EvalPrediction(predictions=prediction.predictions[::-1], label_ids=prediction.label_ids[::-1])
    with pytest.raises(DataError, match="order"):
        entity_scores(windows)(shuffled)
