"""Windows: every word is scored once, whatever its length, and predictions are returned by sentence."""

import numpy as np
import pytest
from seqeval.metrics import f1_score
from transformers import EvalPrediction

from modeling_unihyperlora.errors import ConfigError, DataError
from modeling_unihyperlora.words import NO_WORD
from trainers.decoding import rules_of
from trainers.metrics import entity_scores
from trainers.ner_data import Sentence
from trainers.ner_windows import IGNORED, SentenceWindows

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
LONG_WORD = "supercalifragilistic"  # four pieces


def sentence(text: str, tags: str | None = None) -> Sentence:
    words = text.split()
    return Sentence(words, tags.split() if tags else ["O"] * len(words), "test, line 1")


def scored(windows: SentenceWindows) -> list[int]:
    """All labels that a loss would use, over all windows."""
    return [label for row in windows for label in row["labels"] if label != IGNORED]


def as_batch(rows: list[list[int]], fill: int) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [fill] * (width - len(row)) for row in rows])


def as_logits(label_ids: np.ndarray, count: int = len(LABELS)) -> np.ndarray:
    """Logits (windows, T, C) in which these ids have by far the highest values."""
    return 9.0 * np.eye(count)[np.maximum(label_ids, 0)]


def perfect_prediction(windows: SentenceWindows) -> EvalPrediction:
    label_ids = as_batch([row["labels"] for row in windows], IGNORED)
    return EvalPrediction(predictions=as_logits(label_ids, len(windows.labels)), label_ids=label_ids)


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
        sentences.append(Sentence(words, [str(tag) for tag in generator.choice(["O", "B-LOC", "B-PER"], size)], "x"))
    windows = SentenceWindows(sentences, tokenizer, LABELS, length)
    assert all(len(row["input_ids"]) <= length for row in windows)
    assert [LABELS[label] for label in scored(windows)] == [tag for s in sentences for tag in s.tags]
    predicted = windows.tags_of(perfect_prediction(windows).predictions)
    assert predicted == [s.tags for s in sentences]


def test_windows_are_cut_between_words(tokenizer):
    windows = SentenceWindows([sentence(f"anna {LONG_WORD} lives in rome")], tokenizer, LABELS, 7)
    pieces = [tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1] for row in windows]
    assert pieces == [["anna", "super", "##cali", "##fragi", "##listic"], ["lives", "in", "rome"]]
    assert [(window.first_word, len(window.starts)) for window in windows.windows] == [(0, 2), (2, 3)]


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
    assert windows.tags_of(as_logits(np.array([[0, 1, 0]]))) == [[], ["B-LOC"], []]


def test_nothing_but_empty_sentences(tokenizer):
    with pytest.raises(DataError, match="no sentence has a word"):
        SentenceWindows([sentence("")], tokenizer, LABELS, 16)


def test_no_room_for_a_word(tokenizer):
    with pytest.raises(ConfigError, match="max_seq_length=2"):
        SentenceWindows([sentence("rome")], tokenizer, LABELS, 2)


# ---- overlapping windows ----


def most_context(lengths: list[int], spans: list[tuple[int, int]], word: int) -> int:
    """Largest context of a word in any span, in sub-tokens on its shorter side, by plain counting."""
    sides = []
    for first, end in spans:
        if first <= word < end:
            left = sum(lengths[first:word]) if first else 10**6
            right = sum(lengths[word + 1 : end]) if end < len(lengths) else 10**6
            sides.append(min(left, right))
    return max(sides)


@pytest.mark.parametrize("length", [3, 4, 6, 9, 14, 30])
def test_each_word_is_scored_where_it_has_most_context(tokenizer, length):
    generator, room = np.random.default_rng(length), length - 2
    for size in generator.integers(1, 60, 30):
        words = [str(word) for word in generator.choice(["anna", "cali", LONG_WORD], size, p=[0.7, 0.1, 0.2])]
        windows = SentenceWindows([Sentence(words, ["O"] * size, "x")], tokenizer, LABELS, length)
        lengths = [min(room, 4 if word == LONG_WORD else 1) for word in words]
        assert [w for win in windows.windows for w in range(win.first_word, win.first_word + len(win.starts))] == [
            *range(size)
        ]
        spans, contexts = [], []
        for window in windows.windows:
            before = window.starts[0] - 1  # sub-tokens of words that another window scores
            first = window.first_word
            while before:
                first, before = first - 1, before - lengths[first - 1]
            end, inside = first, len(window.input_ids) - 2
            while inside:
                end, inside = end + 1, inside - lengths[end]
            spans.append((first, end))
            for word, start in enumerate(window.starts, window.first_word):
                left = start - 1 if first else 10**6
                right = len(window.input_ids) - 1 - start - lengths[word] if end < size else 10**6
                contexts.append(min(left, right))
        assert contexts == [most_context(lengths, spans, word) for word in range(size)]
        if room >= 16:
            assert min(contexts) >= room // 4 - 4  # a quarter, but for whole words


def test_a_sentence_that_fits_is_one_window_and_long_ones_overlap_by_half(tokenizer):
    assert len(SentenceWindows([sentence("anna " * 14)], tokenizer, LABELS, 16)) == 1
    windows = SentenceWindows([sentence("anna " * 28)], tokenizer, LABELS, 16)
    assert [len(row["input_ids"]) for row in windows] == [16, 16, 16]
    assert [(window.first_word, len(window.starts)) for window in windows.windows] == [(0, 11), (11, 7), (18, 10)]


def test_an_entity_across_the_border_is_whole(tokenizer):
    """The scores of both windows are joined before the sentence is decoded."""
    tags = "B-PER " + "I-PER " * 11
    windows = SentenceWindows([sentence("anna " * 12, tags)], tokenizer, LABELS, 8)
    assert len(windows) > 2
    prediction = perfect_prediction(windows)
    assert windows.tags_of(prediction.predictions) == [tags.split()]
    assert entity_scores(windows)(prediction)["f1"] == 1
    rules = rules_of(LABELS, "IOB2")
    assert not rules.begin[LABELS.index("I-PER")], "each window for itself would begin anew"


def test_a_window_alone_does_not_begin_a_sentence(tokenizer):
    """B-LOC in the first window allows I-LOC in the second; I-LOC does not pull B-LOC into the first."""
    windows = SentenceWindows([sentence("anna " * 6)], tokenizer, LABELS, 5)
    label_ids = as_batch([row["labels"] for row in windows], IGNORED)
    logits = as_logits(label_ids)
    second = windows.windows[1]
    logits[1, second.starts[0]] = [0, 0, 5, 0, 0]  # I-LOC, best by 5
    assert windows.tags_of(logits) == [["O"] * 6]  # 9 for the O before it: O I-LOC is not allowed
    logits[0, windows.windows[0].starts[-1]] = [0, 9, 0, 0, 0]
    found = windows.tags_of(logits)[0]
    assert found[second.first_word - 1 : second.first_word + 1] == ["B-LOC", "I-LOC"]


def test_cut_words_are_counted_in_a_warning(tokenizer, caplog):
    SentenceWindows([sentence(f"anna {LONG_WORD} {LONG_WORD}")], tokenizer, LABELS, 5)
    assert "2 words are longer than 3 sub-tokens" in caplog.text


def test_sentences_without_tags_are_tagged(tokenizer):
    windows = SentenceWindows([Sentence(["anna", "lives"], None, "x")], tokenizer, LABELS, 16)
    assert set(windows[0]) == {"input_ids", "attention_mask", "word_index"}
    assert windows[0]["word_index"] == [NO_WORD, 0, 1, NO_WORD]
    [row] = windows.rows_of(as_logits(np.array([[0, 3, 0, 0]])))
    assert row["ner_tags"] == ["B-PER", "O"] and row["tokens"] == windows.sentences[0].tokens
    assert callable(entity_scores(windows))


@pytest.mark.parametrize(
    ("tags", "labels", "scheme", "expected"),
    [
        ("B-PER I-PER", LABELS, "IOB2", [3, 4, 4, 4, 4]),
        ("I-PER O", LABELS, "IOB1", [4, 4, 4, 4, 0]),
        ("B-PER O", ["O", "B-PER"], "IOB2", [1, 1, 1, 1, 0]),  # no I-PER to have
        ("S-PER O", ["O", "B-PER", "I-PER", "E-PER", "S-PER"], "IOBES", [4, 4, 4, 4, 0]),
        ("B O", ["O", "B", "I"], "IOB2", [1, 2, 2, 2, 0]),
        ("PER O", ["O", "PER"], "IO", [1, 1, 1, 1, 0]),
    ],
)
def test_all_sub_tokens_may_be_labelled(tokenizer, tags, labels, scheme, expected):
    words = [sentence(f"{LONG_WORD} anna", tags)]
    windows = SentenceWindows(words, tokenizer, labels, 16, scheme, label_all_tokens=True)
    assert windows[0]["labels"] == [IGNORED, *expected, IGNORED]
    assert windows.tags_of(perfect_prediction(windows).predictions) == [tags.split()]
    assert entity_scores(windows)(perfect_prediction(windows))["accuracy"] == 1


# ---- scores ----


def test_scores_are_those_of_whole_sentences(tokenizer):
    """An entity across a window border counts once, as in the sentence."""
    sentences = [sentence("anna and ben flew to the rome", "B-PER I-PER I-PER O O B-LOC I-LOC")]
    windows = SentenceWindows(sentences, tokenizer, LABELS, 4)  # two words a window
    assert [window.first_word for window in windows.windows] == [0, 2, 3, 4, 5, 6]
    prediction = perfect_prediction(windows)
    assert entity_scores(windows)(prediction) == {"precision": 1, "recall": 1, "f1": 1, "accuracy": 1}
    prediction.predictions[1, 2] = [9, 0, 0, 0, 0]  # the third word, inside the first entity
    scores = entity_scores(windows)(prediction)
    found = [["B-PER", "I-PER", "O", "O", "O", "B-LOC", "I-LOC"]]
    assert scores["f1"] == f1_score([sentences[0].tags], found) == 0.5
    assert scores["accuracy"] == pytest.approx(6 / 7)


def test_scores_by_type(tokenizer):
    windows = SentenceWindows([sentence("anna in rome", "B-PER O B-LOC")], tokenizer, LABELS, 16)
    prediction = perfect_prediction(windows)
    prediction.predictions[0, 3] = [9, 0, 0, 0, 0]
    scores = entity_scores(windows, by_type=True)(prediction)
    assert (scores["PER_f1"], scores["LOC_f1"], scores["LOC_number"]) == (1, 0, 1)
    assert all(type(value) is float for value in scores.values())


def test_text_without_entities_scores_zero(tokenizer):
    windows = SentenceWindows([sentence("in the")], tokenizer, LABELS, 16)
    scores = entity_scores(windows, by_type=True)(perfect_prediction(windows))
    assert scores == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1}


@pytest.mark.parametrize(
    ("tags", "entities"),
    [("PER PER O LOC", 2), ("B-X L-X U-X U-X", 3), ("B-X E-X S-X S-X", 3), ("I-X I-X O I-Y", 2)],
)
def test_other_tag_schemes(tokenizer, tags, entities):
    labels = sorted(set(tags.split()) | {"O"})
    windows = SentenceWindows([sentence("anna anna anna anna", tags)], tokenizer, labels, 16)
    assert windows.scheme is None
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
