"""``model.read``: the states of words, whatever form the text has, and however long it is."""

import datasets
import numpy as np
import pytest
import torch

from modeling_unihyperlora import ConfigError, DataError, HostError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.corpus.reading import read, text_column
from modeling_unihyperlora.hosts import NoHost
from modeling_unihyperlora.words import CUT, cut_words
from tests.modeling_unihyperlora.small_streams import TOKENIZER, WORDS, D, bert, small_space, small_stream
from trainers.findings import WordCutter

SENTENCES = [["word1", "unknown", "word3"], [], ["word7"], ["word2"] * 20]


@pytest.fixture(scope="module")
def model():
    return small_stream()


def float64_states(model, words: list[str]) -> np.ndarray:
    """(W, K, D): the host in float64, one text alone, and the map as its formula is printed."""
    ids, starts = [TOKENIZER.cls_token_id], []
    for word in words:
        starts.append(len(ids))
        ids += TOKENIZER(word, add_special_tokens=False)["input_ids"]
    host = bert().double()
    with torch.no_grad():
        ids = torch.tensor([[*ids, TOKENIZER.sep_token_id]])
        hidden = host(input_ids=ids, output_hidden_states=True).hidden_states
    states = [layer[0, starts] for layer in hidden]
    fit = model.stream.fit
    near = fit.landmarks
    query = torch.cat([states[layer] for layer in fit.layers], -1) @ near.matrix.double().T + near.offset.double()
    distance = (query[:, None] - near.at.double()).square().sum(-1)
    by_landmarks = (torch.exp(-distance) @ near.weights.double().T).unflatten(1, (5, D))
    knots = [states[knot.layer] @ knot.matrix.double().T + knot.offset.double() for knot in fit.knots]
    return (torch.stack(knots, dim=1) + by_landmarks).numpy()


def test_states_are_those_of_a_float64_reference(model):
    found = model.read(SENTENCES)
    assert found["words"] == SENTENCES
    for words, states in zip(SENTENCES, found["states"], strict=True):
        assert states.dtype == np.float16 and states.shape == (len(words), 5, D)
        if words:
            np.testing.assert_allclose(states.astype(float), float64_states(model, words), atol=5e-3)


def test_states_are_what_a_forward_pass_computes(model):
    words = [f"word{number}" for number in range(9)]
    [states] = model.read([words])["states"]
    batch = TOKENIZER(" ".join(words), return_tensors="pt")
    by_states = model(canonical_states=torch.from_numpy(states.astype(np.float32))[None]).logits[0]
    torch.testing.assert_close(by_states, model(**batch).logits[0, 1:-1], atol=2e-3, rtol=1e-2)


def test_raw_text_has_the_words_it_is_cut_into(model):
    text = "word1, word2 (word3)."
    found = model.read([text])
    assert found["words"] == [["word1", ",", "word2", "(", "word3", ")", "."]] == [cut_words(text)]
    np.testing.assert_array_equal(found["states"][0], model.read(found["words"])["states"][0])


@pytest.mark.parametrize(
    "text", ["a-b c", "Al-Ain's «x»\u00a0y", "e\u0301! 日本 👍🏽ok", "\u200bword\t.", "$5.00/day"]
)
def test_words_are_those_that_tagging_cuts(text):
    assert cut_words(text) == [text[start:end] for start, end in WordCutter(CUT)(text)]


@pytest.mark.parametrize("text", ["", "  \n ", "\u200b"])
def test_text_of_no_words(model, text):
    found = model.read([text, "word1"])
    assert [len(words) for words in found["words"]] == [len(states) for states in found["states"]]
    assert found["words"][1] == ["word1"]


def test_no_text_and_one_text(model):
    assert read(model, []) == {"words": [], "states": []}
    with pytest.raises(DataError, match="one text was given"):
        read(model, "Rome is old")


def test_long_text_is_read_in_windows_that_overlap(model):
    words = np.random.default_rng(0).choice(WORDS, 150).tolist()
    [states] = model.read([words], max_seq_length=34)["states"]
    assert states.shape == (150, 5, D) and np.isfinite(states).all()
    alone = model.read([words[:32]])["states"][0]
    np.testing.assert_allclose(states[:20].astype(float), alone[:20].astype(float), atol=5e-3)  # the first window
    assert np.abs(states[31].astype(float) - alone[31]).max() > 0.05  # which had no context on its right there


def test_what_is_read_together_does_not_matter(model):
    sentences = [np.random.default_rng(seed).choice(WORDS, 3 + 5 * (seed % 4)).tolist() for seed in range(30)]
    together, alone = model.read(sentences, batch_size=7), model.read(sentences, batch_size=1)
    for a, b in zip(together["states"], alone["states"], strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=4e-3)


def test_it_maps_a_data_set(model):
    rows = datasets.Dataset.from_dict({"tokens": SENTENCES, "label": [0, 1, 0, 1]})
    read_rows = rows.map(model.read, batched=True, batch_size=2).with_format("numpy")
    assert read_rows.column_names == ["tokens", "label", "words", "states"]
    expected = model.read(SENTENCES)["states"]
    for number in (0, 2, 3):
        np.testing.assert_allclose(read_rows[number]["states"], expected[number], atol=4e-3)
    assert len(read_rows[1]["states"]) == 0


def test_another_column_is_named(model):
    rows = datasets.Dataset.from_dict({"text": ["word1"], "body": ["word2 word3"]})
    assert rows.map(model.read, batched=True, fn_kwargs={"column": "body"})["words"][0] == ["word2", "word3"]
    with pytest.raises(ConfigError, match="no column 'title'; they have text, body"):
        model.read({"text": ["word1"], "body": [""]}, column="title")
    assert text_column(["sentence", "text"]) == "text"
    with pytest.raises(ConfigError, match="none of the columns tokens, words, text, sentence"):
        text_column(["body"])


@pytest.mark.parametrize(
    ("row", "said"),
    [(5, "row 1 is '5', of type int"), (None, "row 1 is 'None'"), (["a", 3], "row 1"), ("a\ud800b", "surrogate pair")],
)
def test_a_row_that_is_no_text_is_refused_by_its_number(model, row, said):
    with pytest.raises(DataError, match=said):
        model.read(["word1", row])


def test_a_host_in_training_mode_is_read_without_dropout(model):
    [expected] = model.read([WORDS[:9]])["states"]
    model.host.train()
    [states] = model.read([WORDS[:9]])["states"]
    assert model.host.training
    model.host.eval()
    np.testing.assert_array_equal(states, expected)


class TestNoHost:
    def make(self):
        return UniHyperLoraForTokenClassification.from_host(
            NoHost("some/host"), labels=["O", "B-X"], space=small_space(), reader="small"
        )

    def test_computes_on_states_that_are_given(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        without = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=NoHost())
        states = torch.from_numpy(model.read([WORDS[:6]])["states"][0].astype(np.float32))[None]
        torch.testing.assert_close(without(canonical_states=states).logits, model(canonical_states=states).logits)

    def test_reads_no_text(self):
        without = self.make()
        with pytest.raises(ConfigError, match="This host reads canonical_states"):
            without(**TOKENIZER("word1", return_tensors="pt"))
        with pytest.raises(HostError, match="no host in memory"):
            read(without, ["word1"])
        assert "without a host" in without.describe()

    def test_is_saved_as_any_adapter_is(self, tmp_path):
        self.make().save_pretrained(tmp_path)
        loaded = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=bert(), tokenizer=TOKENIZER)
        assert loaded.config.base_model_name_or_path == "some/host"
        assert loaded(**TOKENIZER("word1 word2", return_tensors="pt")).logits.shape == (1, 4, 2)
