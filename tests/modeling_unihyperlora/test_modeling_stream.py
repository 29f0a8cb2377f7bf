"""The portable stream: calibration, words, the way of one word, and one file on hosts of other shapes."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from modeling_unihyperlora import (
    ConfigError,
    HostError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.adapter import KNOTS, PARTS, part_of
from modeling_unihyperlora.anchors import read_anchors, word_states
from modeling_unihyperlora.errors import DataError
from modeling_unihyperlora.storage import bytes_of_parts
from modeling_unihyperlora.stream import disturb
from modeling_unihyperlora.token_mixer import Words
from modeling_unihyperlora.words import WordReader
from tests.conftest import piece_tokenizer
from tests.modeling_unihyperlora.test_accounting import TOKENS, products_a_token, realistic
from tests.modeling_unihyperlora.test_calibration import fit_tensors

WORDS = [f"word{i}" for i in range(40)]
LABELS = ["O", "B-PER", "I-PER"]
D = 12


@pytest.fixture(scope="module")
def tokenizer():
    return piece_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "un", "##known"], 64)


@pytest.fixture(scope="module")
def anchor_file(tmp_path_factory):
    generator = np.random.default_rng(5)
    lines = [" ".join(generator.choice(WORDS, 8)) for _ in range(60)]
    path = tmp_path_factory.mktemp("anchors") / "anchors.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def bert(width: int, blocks: int, seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
    }
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=64, **shape)).eval()


def distilbert() -> DistilBertModel:
    torch.manual_seed(3)
    return DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=24, n_layers=3, n_heads=2, hidden_dim=48, max_position_embeddings=64)
    ).eval()


@pytest.fixture
def model(tokenizer, anchor_file):
    config = UniHyperLoraConfig(
        pathway="stream", stream_dim=D, atoms=16, anchor_dim=16, stream_width=10, stream_hidden=6
    )
    made = UniHyperLoraForTokenClassification.from_host(
        bert(32, 4), labels=LABELS, task="people", config=config, tokenizer=tokenizer, anchor_file=anchor_file
    )
    for parameter in made.adapter.parameters():
        if parameter is not made.adapter.anchors.coordinates.latent:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(folder))
    return folder


def same_fit(one, other) -> bool:
    def close(a, b):
        return torch.allclose(a, b, rtol=1e-3, atol=1e-4)

    one, other = (fit_tensors(fit) for fit in (one, other))
    return all(close(a, b) for a, b in zip(one, other, strict=True))


def batch(tokenizer):
    return tokenizer(["word1 unknown word3", "word7 word2"], padding=True, return_tensors="pt")


class TestKeptCalibration:
    def test_is_kept_by_content_and_made_again_when_damaged(self, model, tokenizer, tmp_path, own_cache, monkeypatch):
        model.save_pretrained(tmp_path)
        (kept,) = own_cache.glob("calibration-*")
        first, host = model.stream.fit, model.detach()
        monkeypatch.setattr("modeling_unihyperlora.stream.read_anchor_states", None)  # it would have to run the host
        again = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=tokenizer)
        assert same_fit(again.stream.fit, first)
        weight = host.encoder.layer[0].output.dense.weight.data
        before = weight.clone()
        weight.mul_(1.01)  # same name, other weights
        with pytest.raises(TypeError):
            UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=tokenizer)
        weight.copy_(before)
        monkeypatch.undo()
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(own_cache))
        kept.write_bytes(kept.read_bytes()[:-100])
        again = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=tokenizer)
        assert same_fit(again.stream.fit, first)

    def test_a_cache_that_cannot_be_written_does_no_harm(self, model, tokenizer, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "file" / "cache"))
        first = model.stream.fit
        model.calibrate(tokenizer)
        assert same_fit(model.stream.fit, first)


class TestAnchors:
    def test_package_text_is_plain_and_large_enough(self):
        sentences = read_anchors()
        assert 280 <= len(sentences) <= 340 and 4500 <= sum(map(len, sentences)) <= 5500
        assert all(word.isascii() for sentence in sentences for word in sentence)

    def test_too_few_words_or_no_text_are_refused(self, tmp_path):
        (tmp_path / "few.txt").write_text("only four words here", encoding="utf-8")
        (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        for name, message in (("few.txt", "has 4 words"), ("bytes.txt", "UTF-8"), ("none.txt", "cannot be read")):
            with pytest.raises(DataError, match=message):
                read_anchors(tmp_path / name)

    def test_states_are_those_of_first_sub_tokens(self, tokenizer):
        host = bert(32, 4)
        sentences = [["word1", "unknown", "word3"], ["word7"]]
        states = word_states(host, WordReader(host, tokenizer), sentences, [0, 4])
        with torch.no_grad():
            ids = tokenizer("word1 unknown word3", return_tensors="pt")["input_ids"]
            hidden = host(ids, output_hidden_states=True).hidden_states
        for k, layer in enumerate((0, 4)):
            torch.testing.assert_close(states[k, :3], hidden[layer][0, [1, 2, 4]], rtol=1e-4, atol=1e-5)


class TestWords:
    def test_a_piece_inside_a_word_has_its_words_scores(self, model, tokenizer):
        logits = model(**batch(tokenizer)).logits
        assert torch.equal(logits[0, 2], logits[0, 3]) and not torch.equal(logits[0, 1], logits[0, 2])


class TestStream:
    def test_the_way_of_a_word_is_the_papers(self, model, tokenizer):
        """Every word's features before the recurrent layer, recomputed in float64 with loops."""
        seen = {}
        hook = model.adapter.token_mixer.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        inputs = batch(tokenizer)
        out = model(**inputs)
        hook.remove()
        value = {n: m().detach().double() for n, m in model.adapter.named_modules() if hasattr(m, "codec")}
        with torch.no_grad():
            hidden = model.host(**inputs, output_hidden_states=True).hidden_states
        own = "tasks.people."
        active = 0
        for k, (knot, near) in enumerate(zip(KNOTS, ([0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]), strict=True)):
            h = torch.cat([hidden[layer][0, 1] for layer in near]).double()
            fit = model.stream.fit
            z = fit.knots[k].matrix.double() @ h + fit.knots[k].offset.double()
            asked = torch.cat([hidden[layer][0, 1] for layer in fit.landmarks.layers]).double()
            query = fit.landmarks.matrix.double() @ asked + fit.landmarks.offset.double()
            for r, landmark in enumerate(fit.landmarks.at.double()):
                near_it = torch.exp(-(query - landmark).square().sum())
                z = z + near_it * fit.landmarks.weights[k * D : (k + 1) * D, r].double()
            features = torch.tensor([1.0, knot, *(float(k == i) for i in range(6))], dtype=torch.float64)
            amendment = torch.zeros_like(z)
            for j, share in enumerate(features @ value[own + "delta"]):
                amendment += share * value["atoms_out"][j] * (value["atoms_in"][j] @ z)
            z = z + amendment
            wave = torch.cat([torch.sin(value["mixer.hidden"] @ features), torch.ones(1, dtype=torch.float64)])
            weight = value["mixer.output"] @ wave
            score = value["router_weight"] @ z / z.square().mean().sqrt()
            score = score + value["router_bias"] + value["router_weight"] @ value[own + "embedding"]
            moved = z.clone()
            for j in score.topk(2).indices:
                if score[j] > 0:
                    active += 1
                    dot = value["atoms_in"][j] @ z
                    moved += score[j].sigmoid() * weight[j] * value["atoms_out"][j] * dot
            mine = seen["z"][0, k * D : (k + 1) * D].double()  # the first word of the first sentence
            torch.testing.assert_close(mine, moved, rtol=1e-3, atol=1e-4)
            assert (moved - z).abs().max() > 1e-3 or active == 0
        assert active > 0, "no atom acted"
        assert out.active_atoms[0, 1] == pytest.approx(active / len(KNOTS))

    def test_recurrent_layer_is_torchs(self, model):
        mixer = model.adapter.token_mixer
        plain = torch.nn.LSTM(10, 6, batch_first=True, bidirectional=True)
        with torch.no_grad():
            for direction, suffix in zip(mixer.directions, ("", "_reverse"), strict=True):
                getattr(plain, f"weight_ih_l0{suffix}").copy_(direction["from_input"]())
                getattr(plain, f"weight_hh_l0{suffix}").copy_(direction["from_state"]())
                getattr(plain, f"bias_ih_l0{suffix}").copy_(direction["bias"]())
                getattr(plain, f"bias_hh_l0{suffix}").zero_()
            z = torch.randn(2, 5, 5 * D)
            x = torch.nn.functional.gelu(z @ mixer.inward().T + mixer.inward_bias())
            mine = mixer(z.flatten(0, 1), Words.in_rows(torch.tensor([5, 3]), 5)).view(2, 5, -1)
            torch.testing.assert_close(mine[0], plain(x[:1])[0][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine[1, :3], plain(x[1:, :3])[0][0], rtol=1e-4, atol=1e-5)

    def test_padding_and_neighbours_do_not_matter(self, model, tokenizer):
        together = model(**batch(tokenizer)).logits
        alone = model(**tokenizer("word7 word2", return_tensors="pt")).logits
        torch.testing.assert_close(together[1, :4], alone[0], rtol=1e-4, atol=1e-5)

    def test_sentences_are_scored_by_the_mean_of_their_words(self, tokenizer, anchor_file):
        shape = {"stream_dim": D, "atoms": 16, "anchor_dim": 16, "stream_width": 10, "stream_hidden": 6}
        config = UniHyperLoraConfig(pathway="stream", **shape)
        model = UniHyperLoraForSequenceClassification.from_host(
            bert(32, 4), labels=["no", "yes"], task="mood", config=config, tokenizer=tokenizer, anchor_file=anchor_file
        ).eval()
        own = model.adapter.tasks["mood"]
        own.head_weight.latent.data.normal_()
        inputs = batch(tokenizer)
        together = model(**inputs, labels=torch.tensor([0, 1]))
        alone = model(**tokenizer("word7 word2", return_tensors="pt")).logits
        torch.testing.assert_close(together.logits[1:], alone, rtol=1e-4, atol=1e-5)
        run = model.run(None, inputs["attention_mask"], None, input_ids=inputs["input_ids"])
        mean = torch.stack([run.features[0, :3].mean(dim=0), run.features[1, :2].mean(dim=0)])
        expected = mean @ own.head_weight().T + own.head_bias()
        torch.testing.assert_close(together.logits, expected)
        reference = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1]))
        torch.testing.assert_close(together.loss, reference)

    @pytest.mark.parametrize("kind", [UniHyperLoraForTokenClassification, UniHyperLoraForSequenceClassification])
    def test_the_head_of_a_later_task_reads_coordinates_too(self, kind, model, tokenizer, tmp_path):
        model.config.tasks["people"]["trained"] = True
        model.save_pretrained(tmp_path)
        config = UniHyperLoraConfig.from_pretrained(tmp_path)
        config.active_task = None
        later = kind.from_pretrained(tmp_path, config=config, host=model.detach(), tokenizer=tokenizer)
        later.add_task("later", ["x", "y", "z"])
        own, seen, inputs = later.adapter.tasks["later"], {}, batch(tokenizer)
        for stored in (own.head_weight, own.head_bias, own.delta):
            stored.latent.data.normal_()
        later.adapter.token_mixer.register_forward_hook(
            lambda _, args, out: seen.update(z=args[0].double(), features=out.double())
        )
        with torch.no_grad():
            logits = later(**inputs).logits
        weight, bias = own.head_weight().double(), own.head_bias().double()
        words = {0: (0, 3), 1: (3, 5)}  # first row of a sentence and the one after its last
        for row, (start, end) in words.items():
            reads = []
            for at in range(start, end):
                beside = [seen["z"][at]]
                if kind is UniHyperLoraForTokenClassification:
                    nothing = torch.zeros_like(beside[0])
                    beside += [seen["z"][at - 1] if at > start else nothing]
                    beside += [seen["z"][at + 1] if at + 1 < end else nothing]
                reads.append(torch.cat([seen["features"][at], *beside]))
            expected = torch.stack(reads) @ weight.T + bias
            if kind is UniHyperLoraForTokenClassification:
                word_of = later.stream.words.places(inputs["input_ids"], inputs["attention_mask"]).word_of
                got = torch.stack([logits[row, word_of[row] == word][-1] for word in range(end - start)])
            else:
                got, expected = logits[row], expected.mean(dim=0)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        later.save_pretrained(tmp_path / "2")
        again = kind.from_pretrained(tmp_path / "2", host=later.detach(), tokenizer=tokenizer)
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, logits)
            again.adapter.tasks["later"].head_weight.latent[:, 12:] = 0
            assert not torch.allclose(again(**inputs).logits, logits, atol=0.1)

    def test_cached_states_give_the_same_scores(self, model, tokenizer):
        inputs = batch(tokenizer)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        z, places, _ = model.stream.read_host(mask, {"input_ids": ids})
        counts, positions = places.lengths, places.first
        mask_of_words = torch.arange(z.shape[1]) < counts[:, None]
        words = model(canonical_states=z, attention_mask=mask_of_words).logits
        tokens = model(**inputs).logits
        for row in range(2):
            for word in range(counts[row]):
                torch.testing.assert_close(words[row, word], tokens[row, positions[row, word]])

    def test_under_autocast_the_map_is_as_fine_as_ever(self, model, tokenizer, own_cache):
        inputs, first = batch(tokenizer), model.stream.fit
        with torch.no_grad():
            hidden = model.host(**inputs, output_hidden_states=True).hidden_states
            positions = model.stream.words.places(inputs["input_ids"], inputs["attention_mask"]).first
            expected, logits = model.stream.canonical_states(hidden, positions), model(**inputs).logits
            with torch.autocast("cpu", torch.bfloat16):
                got, coarse = model.stream.canonical_states(hidden, positions), model(**inputs).logits
        assert torch.equal(got, expected)
        assert coarse.dtype == torch.bfloat16, "the rest is left to autocast"
        torch.testing.assert_close(coarse.float(), logits, atol=2e-2 * float(logits.abs().max()), rtol=0)
        for kept in own_cache.glob("*.safetensors"):
            kept.unlink()
        with torch.autocast("cpu", torch.bfloat16):
            model.calibrate(tokenizer)
        assert same_fit(model.stream.fit, first)

    def test_disturbance_keeps_the_variance(self):
        z, sentence = torch.randn(4000, 5, D), torch.arange(400).repeat_interleave(10)
        disturbed = disturb(z, sentence, 400, 0.5)
        assert float(disturbed.std()) == pytest.approx(1, rel=0.03)
        same, all_of_it = ((x * z).view(400, -1).mean(dim=1) for x in (disturbed, z))
        rho = same / all_of_it
        assert 0.4 < float(rho.min()) < 0.6 and 0.9 < float(rho.max()) < 1.1
        assert float(rho.mean()) == pytest.approx(0.75, abs=0.03)
        assert torch.equal(disturb(z, sentence, 400, 1.0), z)

    def test_one_file_on_hosts_of_any_shape(self, model, tokenizer, tmp_path):
        model.save_pretrained(tmp_path)
        inputs = batch(tokenizer)
        scores = model(**inputs).logits
        for host in (bert(32, 4), bert(48, 2, seed=1), bert(24, 7, seed=2), distilbert()):
            before = host(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).last_hidden_state
            there = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=tokenizer)
            found = there(**inputs).logits
            assert found.shape == scores.shape and torch.isfinite(found).all()
            assert torch.equal(found, scores) == (host.config.num_hidden_layers == 4)
            after = host(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).last_hidden_state
            assert torch.equal(before, after), "the stream must leave its host alone"
        assert json.loads((tmp_path / "config.json").read_text())["projector"] == "anchored"

    def test_every_stored_tensor_is_of_a_part(self, model):
        parts = bytes_of_parts(model.adapter)
        assert set(parts) == set(PARTS) - {"projector"}
        assert parts["anchors"] == len(model.adapter.anchors.text) + 5 * 480 * D // 4
        assert parts["delta"] == 8 * 16 // 2

    def test_only_the_stream_is_trained(self, model):
        model.set_train_scope("source")
        trained = {part_of(name) for name, p in model.adapter.named_parameters() if p.requires_grad}
        assert trained == set(PARTS) - {"projector", "anchors", "delta"}
        model.set_train_scope("delta")
        trained = [name for name, p in model.adapter.named_parameters() if p.requires_grad]
        assert "tasks.people.delta.latent" in trained and all(name.startswith("tasks.people.") for name in trained)

    @pytest.mark.parametrize("blocks", [2, 6])
    def test_multiply_adds_agree_with_a_profiler_within_two_per_cent(self, blocks, tokenizer, anchor_file):
        host = realistic("bert", 384, blocks)
        alone = products_a_token(host, (1, 2))
        config = UniHyperLoraConfig(pathway="stream")
        model = UniHyperLoraForTokenClassification.from_host(
            host, labels=LABELS, config=config, tokenizer=tokenizer, anchor_file=anchor_file
        ).eval()
        for parameter in (model.adapter.atoms_out, model.adapter.router_bias):
            torch.nn.init.normal_(parameter.latent, 1.0, 0.1)
        with torch.backends.mkldnn.flags(enabled=False):  # there the recurrent layer is one operation
            together = products_a_token(model, (1, 2))
        assert model.stream.host_multiply_adds(TOKENS) == pytest.approx(alone, rel=0.02)
        assert model.stream.added_multiply_adds(3) == pytest.approx(together - alone, rel=0.02)

    def test_delta_changes_what_the_stream_computes(self, model, tokenizer):
        before = model(**batch(tokenizer)).logits
        model.adapter.tasks["people"].delta.latent.data.zero_()
        assert (model(**batch(tokenizer)).logits - before).abs().max() > 1e-4

    def test_choices_that_do_not_go_together(self):
        with pytest.raises(ConfigError, match="does not go with"):
            UniHyperLoraConfig(pathway="stream", projector="dimension")
        with pytest.raises(ConfigError, match="the stream routes every word"):
            UniHyperLoraConfig(pathway="stream", router="static")

    def test_a_host_that_cannot_be_lined_up_is_given_back_as_it_was(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        host = bert(48, 2, seed=1)
        pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), pad_token="a")
        with pytest.raises(HostError, match="does not mark where words begin"):
            UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=pieces)
        assert all(parameter.requires_grad for parameter in host.parameters())

    def test_without_calibration_it_says_what_to_do(self, model):
        model.stream = None
        with pytest.raises(HostError, match="call calibrate"):
            model(torch.tensor([[2, 5, 3]]))
