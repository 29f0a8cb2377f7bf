"""The stream: the computation for one word in float64, and one file on hosts of other shapes."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, pipeline

from modeling_unihyperlora import (
    ConfigError,
    HostError,
    MergeError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
    UniHyperLoraModel,
)
from modeling_unihyperlora.measure.accounting import (
    PARTS,
    added_multiply_adds,
    bytes_of_parts,
    host_multiply_adds,
    part_of,
)
from modeling_unihyperlora.space import KNOTS
from tests.modeling_unihyperlora.measure.test_accounting import TOKENS, products_a_token, realistic
from tests.modeling_unihyperlora.small_streams import (
    LABELS,
    MOODS,
    READER,
    TOKENIZER,
    D,
    batch,
    bert,
    distilbert,
    small_space,
    small_stream,
    stirred,
    tensors_of,
)


@pytest.fixture
def model():
    return small_stream()


class TestStream:
    def test_the_way_of_a_word_is_that_of_the_formulas(self, model):
        """The reader's input for every word, recomputed in float64 with loops."""
        seen = {}
        hook = model.adapter.tasks["people"].reader.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        inputs = batch()
        model(**inputs)
        hook.remove()
        value = {n: m().detach().double() for n, m in model.adapter.named_modules() if hasattr(m, "codec")}
        with torch.no_grad():
            hidden = model.host(**inputs, output_hidden_states=True).hidden_states
        places = [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2)]  # first sub-tokens, "unknown" has two
        assert len(seen["z"]) == len(places)
        fit = model.stream.fit  # of four blocks
        for number, (row, token) in enumerate(places):
            for k, knot in enumerate(KNOTS):
                h = hidden[k][row, token].double()
                z = fit.knots[k].matrix.double() @ h + fit.knots[k].offset.double()
                asked = torch.cat([hidden[layer][row, token] for layer in fit.layers]).double()
                query = fit.landmarks.matrix.double() @ asked + fit.landmarks.offset.double()
                for r, landmark in enumerate(fit.landmarks.at.double()):
                    near_it = torch.exp(-(query - landmark).square().sum())
                    z = z + near_it * fit.landmarks.weights[k * D : (k + 1) * D, r].double()
                features = torch.tensor([1.0, knot, *(float(k == i) for i in range(6))], dtype=torch.float64)
                amended = z.clone()
                for j, share in enumerate(features @ value["tasks.people.delta"]):
                    amended += share * value["space.atoms_out"][j] * (value["space.atoms_in"][j] @ z)
                mine = seen["z"][number, k * D : (k + 1) * D].double()
                torch.testing.assert_close(mine, amended, rtol=1e-3, atol=1e-3)
                assert (amended - z).abs().max() > 1e-2

    def test_a_piece_inside_a_word_has_its_words_scores(self, model):
        """Except that B-PER becomes I-PER there."""
        logits = model(**batch()).logits
        assert torch.equal(logits[0, 2, 0], logits[0, 3, 0]) and not torch.equal(logits[0, 1], logits[0, 2])
        assert torch.equal(logits[0, 3, 1:], logits[0, 2, 1:].sort().values)

    def test_padding_and_neighbours_do_not_matter(self, model):
        together = model(**batch()).logits
        alone = model(**batch(("word7 word2",))).logits
        torch.testing.assert_close(together[1, :4], alone[0], rtol=1e-4, atol=1e-5)

    def test_words_are_tagged_by_the_head_on_their_features(self, model):
        own, inputs = model.adapter.tasks["people"], batch(("word7 word2 word5",))
        run = model.stream.read(inputs["attention_mask"], {"input_ids": inputs["input_ids"]})
        features = run.features("people")[0].double()
        expected = features @ own.head_weight().double().T + own.head_bias().double()
        out = model(**inputs, labels=torch.tensor([[-100, 1, 2, 0, -100]]))
        torch.testing.assert_close(out.logits[0, 1:4].double(), expected, rtol=1e-4, atol=1e-5)
        loss = torch.nn.functional.cross_entropy(expected, torch.tensor([1, 2, 0]))
        torch.testing.assert_close(out.loss.double(), loss, rtol=1e-4, atol=1e-5)

    def test_sentences_are_scored_by_the_mean_of_their_words(self):
        model = small_stream(labels=MOODS, task="mood", cls=UniHyperLoraForSequenceClassification)
        own, inputs = model.adapter.tasks["mood"], batch()
        together = model(**inputs, labels=torch.tensor([0, 1]))
        alone = model(**batch(("word7 word2",))).logits
        torch.testing.assert_close(together.logits[1:], alone, rtol=1e-4, atol=1e-5)
        features = model.stream.read(inputs["attention_mask"], {"input_ids": inputs["input_ids"]}).features("mood")
        mean = torch.stack([features[0, :3].mean(dim=0), features[1, :2].mean(dim=0)])
        expected = mean @ own.head_weight().T + own.head_bias()
        torch.testing.assert_close(together.logits, expected)
        reference = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1]))
        torch.testing.assert_close(together.loss, reference)

    def test_canonical_states_give_the_same_scores(self, model):
        inputs = batch()
        run = model.stream.read(inputs["attention_mask"], {"input_ids": inputs["input_ids"]})
        mask = torch.arange(run.z.shape[1]) < run.lengths[:, None]
        words, tokens = model(canonical_states=run.z, attention_mask=mask).logits, model(**inputs).logits
        assert run.lengths.tolist() == [3, 2]
        for row in range(2):
            for word in range(run.lengths[row]):
                torch.testing.assert_close(words[row, word], tokens[row, run.places.first[row, word]])
        alone = model(canonical_states=run.z[1:, :2]).logits  # without a mask all are words
        torch.testing.assert_close(alone[0], words[1, :2])

    def test_canonical_states_of_one_host_serve_another(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        load = {"host": bert(24, 7, seed=2), "tokenizer": TOKENIZER}
        there = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, **load)
        z = torch.randn(2, 5, len(KNOTS), D)
        assert torch.equal(there(canonical_states=z).logits, model(canonical_states=z).logits)

    def test_the_model_without_a_head_returns_its_hosts_states(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        plain = UniHyperLoraModel.from_pretrained(tmp_path, host=model.detach(), tokenizer=TOKENIZER)
        out, expected = plain(**batch(), output_hidden_states=True), plain.host(**batch(), output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
        assert all(map(torch.equal, out.hidden_states, expected.hidden_states))
        with pytest.raises(ConfigError, match="has no head"):
            plain.add_task("later", LABELS)

    def test_under_autocast_the_map_is_as_fine_as_ever(self, model, tmp_path, monkeypatch):
        inputs, first = batch(), model.stream.fit
        with torch.no_grad():
            hidden = model.host(**inputs, output_hidden_states=True).hidden_states
            positions = model.stream.words.places(inputs["input_ids"], inputs["attention_mask"]).first
            expected, logits = model.stream.canonical_states(hidden, positions), model(**inputs).logits
            with torch.autocast("cpu", torch.bfloat16):
                got, coarse = model.stream.canonical_states(hidden, positions), model(**inputs).logits
        assert torch.equal(got, expected)
        assert coarse.dtype == torch.bfloat16, "the rest is left to autocast"
        torch.testing.assert_close(coarse.float(), logits, atol=3e-2 * float(logits.abs().max()), rtol=0)
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "empty"))
        with torch.autocast("cpu", torch.bfloat16):
            model.calibrate(TOKENIZER)
        for one, other in zip(tensors_of(model.stream.fit), tensors_of(first), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_one_file_on_hosts_of_any_shape(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        inputs = batch()
        scores = model(**inputs).logits
        for host in (bert(), bert(48, 2, seed=1), bert(24, 7, seed=2), distilbert()):
            own = {k: v for k, v in inputs.items() if k != "token_type_ids"}
            before = host(**own).last_hidden_state
            there = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=TOKENIZER)
            found = there(**inputs).logits
            assert found.shape == scores.shape and torch.isfinite(found).all()
            assert torch.equal(found, scores) == (host.config.num_hidden_layers == 4)
            assert torch.equal(before, host(**own).last_hidden_state), "the stream must leave its host alone"
            assert there.stream.words.num_layers == host.config.num_hidden_layers

    def test_the_configuration_says_what_the_file_holds(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["space"] == small_space().shape()
        assert config["tasks"]["people"]["reader"] == READER | {"bits": 4}
        [source] = config["source_hosts"]
        assert (source["family"], source["hidden_size"], source["num_layers"]) == ("bert", 32, 4)

    def test_every_stored_tensor_is_of_a_part(self, model):
        parts = bytes_of_parts(model.adapter)
        assert set(parts) == {"space", "reader", "head", "delta"} < set(PARTS)
        atoms = 2 * 16 * (D + 2)
        assert parts["space"] == len(model.adapter.space.text) + len(KNOTS) * 480 * D // 4 + atoms
        assert parts["delta"] == 8 * 16 // 2

    @pytest.mark.parametrize("scope", ["task", "delta"])
    def test_what_is_trained(self, model, scope):
        model.add_task("later", LABELS, reader=READER)
        model.config.tasks["later"]["trained"] = True
        model.set_train_scope(scope)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {part_of(name.removeprefix("adapter.")) for name in trained} == (
            {"reader", "head"} if scope == "task" else {"delta"}
        )
        assert all(name.startswith("adapter.tasks.later.") for name in trained)

    def test_other_scopes_are_refused(self, model):
        for scope in ("source", "all", ""):
            with pytest.raises(ConfigError, match="choose 'task' or 'delta'"):
                model.set_train_scope(scope)

    @pytest.mark.parametrize("worth", [-math.inf, math.inf])
    @pytest.mark.parametrize("blocks", [2, 6])
    def test_multiply_adds_agree_with_a_profiler_within_two_per_cent(self, blocks, worth, tmp_path, monkeypatch):
        monkeypatch.setattr("modeling_unihyperlora.space.WORTH", worth)
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path))
        host = realistic("bert", 384, blocks)
        alone = products_a_token(host, (1, 2))
        model = small_stream(host, reader="large")
        assert (model.stream.fit.landmarks is None) == (worth > 0)
        with torch.backends.mkldnn.flags(enabled=False):  # there the recurrent layer is one operation
            together = products_a_token(model, (1, 2))
        assert host_multiply_adds(model, TOKENS) == pytest.approx(alone, rel=0.02)
        assert added_multiply_adds(model) == pytest.approx(together - alone, rel=0.02)

    def test_it_has_no_update_to_merge(self, model, tmp_path):
        with pytest.raises(MergeError, match="no update to merge"):
            model.merge()
        model.unmerge()
        assert not model.merged

    def test_choices_that_do_not_go_together(self):
        for given in ({"projector": "dimension"}, {"router": "static"}, {"router_top_k": 2}, {"bound_host": {}}):
            with pytest.raises(ConfigError, match="for an injected update, but pathway is 'stream'"):
                UniHyperLoraConfig(**given)
        with pytest.raises(ConfigError, match="choose 'stream' or 'inject'"):
            UniHyperLoraConfig(pathway="both")

    @pytest.mark.parametrize(
        "space",
        [
            {},
            7,
            small_space().shape() | {"dim": 0},
            small_space().shape() | {"dim": 12.0},
            small_space().shape() | {"name": 3},
            small_space().shape() | {"more": 3},
            small_space().shape() | {"anchor_words": 10**6, "dim": 4096},
        ],
        ids=["empty", "number", "no dim", "half a dim", "no name", "more", "too large"],
    )
    def test_a_space_that_cannot_be(self, space):
        with pytest.raises(ConfigError, match="space"):
            UniHyperLoraConfig(space=space)

    def test_a_host_that_cannot_be_lined_up_is_given_back_as_it_was(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        host = bert(48, 2, seed=1)
        pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), pad_token="a")
        given = {"host": host, "tokenizer": pieces}
        with pytest.raises(HostError, match="does not mark where words begin"):
            UniHyperLoraForTokenClassification.from_pretrained(tmp_path, **given)
        with pytest.raises(HostError, match="does not mark where words begin"):
            UniHyperLoraForTokenClassification.from_host(**given, space=small_space(), labels=LABELS)
        with pytest.raises(ConfigError, match="at least two label names"):
            UniHyperLoraForTokenClassification.from_host(
                host, tokenizer=TOKENIZER, space=small_space(), labels=["alone"]
            )
        assert all(parameter.requires_grad for parameter in host.parameters())
        assert not hasattr(host, "_unihyperlora_hold")

    def test_without_calibration_it_says_what_to_do(self, model):
        model.stream = None
        with pytest.raises(HostError, match="call calibrate"):
            model(torch.tensor([[2, 5, 3]]))
        z = torch.randn(1, 2, len(KNOTS), D)
        assert torch.isfinite(model(canonical_states=z).logits).all(), "states need no host"

    def test_a_fit_that_is_bad_is_reported(self, caplog):
        host = bert()
        with torch.no_grad():
            for parameter in host.parameters():
                parameter.zero_()
            host.embeddings.position_embeddings.weight.normal_()  # all words are alike
        small_stream(host)
        assert "fits the adapter's canonical space badly" in caplog.text

    def test_it_is_described_in_one_line(self, model):
        said = stirred(model, "people").describe()
        assert "\n" not in said and small_space().digest in said and "people" in said and "4 blocks x 32" in said


def test_trainable_parameters_are_printed(capsys):
    model = small_stream()
    model.set_train_scope("delta")
    own = model.adapter.tasks["people"]
    trained = own.delta.latent.numel() + own.head_weight.latent.numel() + own.head_bias.latent.numel()
    model.print_trainable_parameters()
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trained / total
    assert (
        capsys.readouterr().out == f"trainable params: {trained} || all params: {total:,} || trainable%: {share:.4f}\n"
    )


def test_a_pipeline_knows_its_tokenizer():
    """Of a stream it is the one that the host was lined up with; another may be given."""
    for cls, kind in (
        (UniHyperLoraForTokenClassification, "token-classification"),
        (UniHyperLoraForSequenceClassification, "text-classification"),
    ):
        model = small_stream(cls=cls)
        made = model.pipeline(device="cpu")
        assert made.task == kind and made.tokenizer is model.stream.words.tokenizer
        expected = pipeline(kind, model=model, tokenizer=model.stream.words.tokenizer, device="cpu")
        assert made("word1 unknown word2") == expected("word1 unknown word2")
    assert model.pipeline(device="cpu", tokenizer=TOKENIZER).tokenizer is TOKENIZER
