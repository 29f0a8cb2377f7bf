"""Refining a host's map on text: the same regression on more words, and the errors."""

import pytest
import torch

from modeling_unihyperlora import ConfigError, DataError, HostError, UniHyperLoraConfig
from modeling_unihyperlora import UniHyperLoraForTokenClassification as Tagger
from modeling_unihyperlora.space import KNOTS, anchor_states, fit_host, knot_layers, layers_read
from tests.conftest import mapped, piece_tokenizer
from tests.modeling_unihyperlora.small_streams import (
    LABELS,
    TOKENIZER,
    WORDS,
    bert,
    small_space,
    small_stream,
    tensors_of,
    text,
)

SHORT = piece_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "un", "##known"], 8)  # six words of a sentence


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source() -> Tagger:
    return small_stream()


@pytest.fixture
def target(source, tmp_path) -> Tagger:
    source.save_pretrained(tmp_path / "adapter")
    return Tagger.from_pretrained(tmp_path / "adapter", host=bert(24, 2, seed=1), tokenizer=TOKENIZER)


def read_by(model: Tagger) -> list[int]:
    return layers_read(model.host.config.num_hidden_layers)


def states_of(model: Tagger, sentences: list[list[str]], read: int) -> torch.Tensor:
    """States (layers, N, d) of the first words of sentences of eight words, each of one sub-token."""
    ids = TOKENIZER(sentences, is_split_into_words=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.host(ids, output_hidden_states=True).hidden_states
    return torch.stack([hidden[layer][:, 1 : 1 + read].flatten(0, 1) for layer in read_by(model)])


def coordinates_of(model: Tagger, sentences: list[list[str]], read: int = 8) -> torch.Tensor:
    """Coordinates (K, N, D) from a model's own map."""
    states = states_of(model, sentences, read)
    if read < 8:  # a sentence that is cut ends one token earlier, after which its states are others
        whole = anchor_states(model.host, model.stream.words, sentences)
        states = whole[:, torch.isfinite(whole).all(dim=-1).all(dim=0)]
    return mapped(model.stream.fit, states.transpose(0, 1), read_by(model)).transpose(0, 1)


def test_a_delta_that_goes_with_a_refined_map_says_so_when_loaded(source, target, tmp_path, caplog):
    load = {"host": bert(24, 2, seed=1), "tokenizer": TOKENIZER}
    assert not caplog.records
    target.refine(text(3), source)
    assert target.stream.refined["words"] == 480
    target.config.tasks["people"]["refined"] = target.stream.refined  # as the trainer does
    target.save_pretrained(tmp_path / "tuned")
    again = Tagger.from_pretrained(tmp_path / "tuned", **load)
    [said] = [record.getMessage() for record in caplog.records if "refine(sentences, source)" in record.getMessage()]
    assert "task 'people'" in said and "480 words" in said
    assert again.stream.refined is None
    for damaged in (7, {"words": 480}, target.stream.refined | {"words": "many"}):
        again.config.tasks["people"]["refined"] = damaged
        with pytest.raises(ConfigError, match="refined=.* does not describe a text"):
            again.config.check()


@pytest.mark.parametrize("read", [8, 6], ids=["all words", "words that the source can read"])
def test_is_the_regression_on_anchors_and_text(source, target, read):
    if read < 8:
        source.calibrate(SHORT)
    words, space = text(3), small_space()
    coordinates = torch.cat([space.canonical(), coordinates_of(source, words, read)], dim=1)
    states = torch.cat([states_of(target, space.sentences(), 8), states_of(target, words, read)], dim=1)
    expected = fit_host(states, knot_layers(2), coordinates)
    unseen, before = states_of(target, text(4), 8).transpose(0, 1), target.stream.fit
    target.refine(words, source)
    got, wanted, old = (mapped(fit, unseen, read_by(target)) for fit in (target.stream.fit, expected, before))
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=2e-2)  # rounding, enlarged by near-equal landmarks
    assert (got - old).abs().mean() > 0.05
    assert len(target.stream.fit.r2) == len(KNOTS)


def test_text_comes_closer_to_what_the_source_says_of_it(source, target):
    words = text(3)
    wanted, before = coordinates_of(source, words), coordinates_of(target, words)
    logits = target(**TOKENIZER("word1 word2", return_tensors="pt")).logits
    target.refine(words, source)
    assert (coordinates_of(target, words) - wanted).square().mean() < 0.8 * (before - wanted).square().mean()
    assert not torch.allclose(target(**TOKENIZER("word1 word2", return_tensors="pt")).logits, logits)


def test_is_computed_once_for_a_text(source, target, monkeypatch):
    target.refine(text(3), source)
    first = tensors_of(target.stream.fit)
    target.calibrate(TOKENIZER)
    monkeypatch.setattr(
        "modeling_unihyperlora.space_making.refinement.anchor_states", None
    )  # it would have to run the hosts
    target.refine(text(3), source)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(target.stream.fit), first, strict=True))
    with pytest.raises(TypeError):
        target.refine(text(5), source)


def test_the_source_reads_a_text_once_for_all_hosts(source, target, tmp_path, monkeypatch):
    third = Tagger.from_pretrained(tmp_path / "adapter", host=bert(20, 3, seed=2), tokenizer=TOKENIZER)
    third.refine(text(3), source)
    expected = tensors_of(third.stream.fit)
    for kept in (tmp_path / "cache").glob("*.safetensors"):
        kept.unlink()
    third.calibrate(TOKENIZER)
    target.refine(text(3), source)
    read = []
    reading = "modeling_unihyperlora.space_making.refinement.anchor_states"
    monkeypatch.setattr(reading, lambda host, *given: read.append(host) or anchor_states(host, *given))
    third.refine(text(3), source)
    assert read == [third.host]
    assert all(torch.equal(*pair) for pair in zip(tensors_of(third.stream.fit), expected, strict=True))
    source.calibrate(SHORT)  # it reads less of a sentence
    third.refine(text(3), source)
    assert read == [third.host, source.host, third.host]


def test_a_long_text_is_read_in_part(source, target, monkeypatch):
    monkeypatch.setattr("modeling_unihyperlora.space_making.refinement.MAX_WORDS", 300)
    monkeypatch.setattr("modeling_unihyperlora.space_making.refinement.MIN_ANCHORS", 200)
    target.refine(text(3), source)
    part = tensors_of(target.stream.fit)
    target.refine(text(3)[::2], source)  # 240 of 480 words
    assert all(torch.equal(*pair) for pair in zip(tensors_of(target.stream.fit), part, strict=True))


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ("another space", ConfigError, "another space"),
            ("another host", HostError, "not trained on"),
            ("few words", DataError, "248 words are too few .* at least 256"),
            ("texts", DataError, "'word1 word2' is a string"),
            ("no stream", ConfigError, "no map of its host to refine"),
        ],
    )
    def test_the_map_stays(self, source, target, tmp_path, given, error, message):
        other = {
            "another space": lambda: small_stream(space=small_space(seed=7)),
            "another host": lambda: Tagger.from_pretrained(
                tmp_path / "adapter", host=bert(16, 2, seed=5), tokenizer=TOKENIZER
            ),
            "no stream": lambda: Tagger.from_host(bert(32, 2), LABELS, "people", UniHyperLoraConfig(pathway="inject")),
        }.get(given, lambda: source)()
        before = target.stream.fit
        sentences = {"few words": text(3, sentences=31), "texts": ["word1 word2"] * 200}.get(given, text(3))
        with pytest.raises(error, match=message):
            target.refine(sentences, other)
        assert target.stream.fit is before
