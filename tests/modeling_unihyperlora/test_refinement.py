"""A host lined up on text as well as on the anchors: the same regression on more words, and what is refused."""

import numpy as np
import pytest
import torch

from modeling_unihyperlora import ConfigError, DataError, HostError, UniHyperLoraConfig
from modeling_unihyperlora import UniHyperLoraForTokenClassification as Tagger
from modeling_unihyperlora.adapter import KNOTS, knot_layers
from modeling_unihyperlora.calibration import fit_host
from modeling_unihyperlora.stream import read_anchor_states
from tests.conftest import mapped, piece_tokenizer
from tests.modeling_unihyperlora.test_calibration import fit_tensors
from tests.modeling_unihyperlora.test_stream import LABELS, WORDS, D, bert

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
TOKENIZER = piece_tokenizer(PIECES, 64)


def text(seed: int, sentences: int = 60) -> list[list[str]]:
    return np.random.default_rng(seed).choice(WORDS, (sentences, 8)).tolist()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path) -> Tagger:
    return new_adapter(tmp_path, seed=0)


@pytest.fixture
def target(source, tmp_path) -> Tagger:
    source.save_pretrained(tmp_path / "adapter")
    return Tagger.from_pretrained(tmp_path / "adapter", host=bert(24, 2, seed=1), tokenizer=TOKENIZER)


def new_adapter(folder, seed: int) -> Tagger:
    anchors = folder / "anchors.txt"
    anchors.write_text("\n".join(map(" ".join, text(seed))), encoding="utf-8")
    config = UniHyperLoraConfig(
        pathway="stream", stream_dim=D, atoms=16, anchor_dim=16, stream_width=10, stream_hidden=6
    )
    given = {"config": config, "tokenizer": TOKENIZER, "anchor_file": anchors}
    made = Tagger.from_host(bert(32, 4, seed), labels=LABELS, task="people", **given).eval()
    head = made.adapter.tasks["people"].head_weight.latent
    head.data = torch.randn_like(head)  # a new one is zero
    return made


def states_of(model: Tagger, sentences: list[list[str]], read: int) -> torch.Tensor:
    """The host's states of the first words of sentences of eight, (layers, N, d); a word is one sub-token."""
    ids = TOKENIZER(sentences, is_split_into_words=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.host(ids, output_hidden_states=True).hidden_states
    return torch.stack([hidden[layer][:, 1 : 1 + read].flatten(0, 1) for layer in model.stream.layers])


def coordinates_of(model: Tagger, sentences: list[list[str]], read: int = 8) -> torch.Tensor:
    """(K, N, D) by a model's own map."""
    states = states_of(model, sentences, read).transpose(0, 1)
    return mapped(model.stream.fit, states, model.stream.layers).transpose(0, 1)


def refine(target: Tagger, source: Tagger, sentences: list[list[str]], length: int = 64) -> None:
    target.refine(sentences, source, TOKENIZER, piece_tokenizer(PIECES, length))


def test_a_delta_that_goes_with_a_refined_map_says_so_when_loaded(source, target, tmp_path, caplog):
    load = {"host": bert(24, 2, seed=1), "tokenizer": TOKENIZER}
    assert not caplog.records
    refine(target, source, text(3))
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


@pytest.mark.parametrize(("length", "read"), [(64, 8), (8, 6)], ids=["all words", "words that the source can read"])
def test_is_the_regression_on_anchors_and_text(source, target, length, read):
    words, stream = text(3), target.stream
    anchors = stream.adapter.anchors
    coordinates = torch.cat([anchors.canonical(), coordinates_of(source, words, read)], dim=1)
    states = torch.cat([states_of(target, anchors.sentences(), 8), states_of(target, words, read)], dim=1)
    expected = fit_host(states, stream.near, knot_layers(2), coordinates)
    unseen, before = states_of(target, text(4), 8).transpose(0, 1), stream.fit
    refine(target, source, words, length)
    got, wanted, old = (mapped(fit, unseen, stream.layers) for fit in (stream.fit, expected, before))
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=2e-2)  # rounding, enlarged by near-equal landmarks
    assert (got - old).abs().mean() > 0.05
    assert len(stream.fit.r2) == len(KNOTS)


def test_text_comes_closer_to_what_the_source_says_of_it(source, target):
    words = text(3)
    wanted, before = coordinates_of(source, words), coordinates_of(target, words)
    logits = target(**TOKENIZER("word1 word2", return_tensors="pt")).logits
    refine(target, source, words)
    assert (coordinates_of(target, words) - wanted).square().mean() < 0.8 * (before - wanted).square().mean()
    assert not torch.allclose(target(**TOKENIZER("word1 word2", return_tensors="pt")).logits, logits)


def test_is_computed_once_for_a_text(source, target, monkeypatch):
    refine(target, source, text(3))
    first = fit_tensors(target.stream.fit)
    target.calibrate(TOKENIZER)
    monkeypatch.setattr("modeling_unihyperlora.refinement.read_anchor_states", None)  # it would have to run the hosts
    refine(target, source, text(3))
    assert all(torch.equal(*pair) for pair in zip(fit_tensors(target.stream.fit), first, strict=True))
    with pytest.raises(TypeError):
        refine(target, source, text(5))


def test_the_source_reads_a_text_once_for_all_hosts(source, target, tmp_path, monkeypatch):
    third = Tagger.from_pretrained(tmp_path / "adapter", host=bert(20, 3, seed=2), tokenizer=TOKENIZER)
    refine(third, source, text(3))
    expected = fit_tensors(third.stream.fit)
    for kept in (tmp_path / "cache").glob("*.safetensors"):
        kept.unlink()
    third.calibrate(TOKENIZER)
    refine(target, source, text(3))
    read = []
    reading = "modeling_unihyperlora.refinement.read_anchor_states"
    monkeypatch.setattr(reading, lambda host, *given: read.append(host) or read_anchor_states(host, *given))
    refine(third, source, text(3))
    assert read == [third.host]
    assert all(torch.equal(*pair) for pair in zip(fit_tensors(third.stream.fit), expected, strict=True))
    refine(third, source, text(3), length=8)  # a source that reads less of a sentence
    assert read == [third.host, source.host, third.host]


def test_a_long_text_is_read_in_part(source, target, monkeypatch):
    monkeypatch.setattr("modeling_unihyperlora.refinement.MAX_WORDS", 300)
    monkeypatch.setattr("modeling_unihyperlora.refinement.MIN_ANCHORS", 200)
    refine(target, source, text(3))
    part = fit_tensors(target.stream.fit)
    refine(target, source, text(3)[::2])  # 240 of 480 words
    assert all(torch.equal(*pair) for pair in zip(fit_tensors(target.stream.fit), part, strict=True))


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ("another adapter", ConfigError, "another adapter"),
            ("another host", HostError, "not trained on"),
            ("few words", DataError, "248 words are too few .* at least 256"),
            ("texts", DataError, "'word1 word2' is a text"),
            ("no stream", ConfigError, "only a stream"),
        ],
    )
    def test_the_map_stays(self, source, target, tmp_path, given, error, message):
        (tmp_path / "other").mkdir()
        other = {
            "another adapter": lambda: new_adapter(tmp_path / "other", seed=7),
            "another host": lambda: Tagger.from_pretrained(
                tmp_path / "adapter", host=bert(16, 2, seed=5), tokenizer=TOKENIZER
            ),
            "no stream": lambda: Tagger.from_host(bert(32, 2), LABELS, "people", UniHyperLoraConfig(pathway="inject")),
        }.get(given, lambda: source)()
        before = target.stream.fit
        sentences = {"few words": text(3, sentences=31), "texts": ["word1 word2"] * 200}.get(given, text(3))
        with pytest.raises(error, match=message):
            refine(target, other, sentences)
        assert target.stream.fit is before
