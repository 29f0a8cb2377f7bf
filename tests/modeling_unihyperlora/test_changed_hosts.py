"""Changed hosts, host families with a user's layout, and several adapters at once."""

import copy
import json
import shutil
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, BertConfig, T5Config, T5Model

from modeling_unihyperlora import (
    ConfigError,
    HostError,
    HostLayout,
    MergeError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.hosts import encoder_of, fingerprint, load_host
from modeling_unihyperlora.sites import linear_multiply_adds
from modeling_unihyperlora.space import word_states
from modeling_unihyperlora.words import WordReader, load_tokenizer
from tests.conftest import tiny_tokenizer

load = UniHyperLoraForTokenClassification.from_pretrained
LABELS = ["O", "B-A", "I-A"]


def keep(linear: nn.Linear, rows: slice = slice(None), columns: slice = slice(None)) -> nn.Linear:
    """A linear layer reduced to some of its outputs and inputs."""
    weight = linear.weight.detach()[rows, columns]
    smaller = nn.Linear(weight.shape[1], weight.shape[0])
    smaller.weight.data, smaller.bias.data = weight.clone(), linear.bias.detach()[rows].clone()
    return smaller


def without_a_head_and_some_neurons(host):
    """A pruned host: block 0 has three of four heads, block 1 a third of its feed-forward width."""
    attention, second = host.encoder.layer[0].attention, host.encoder.layer[1]
    kept = slice(8, 32)  # heads of 8
    for name in ("query", "key", "value"):
        setattr(attention.self, name, keep(getattr(attention.self, name), rows=kept))
    attention.self.num_attention_heads, attention.self.all_head_size = 3, 24
    attention.output.dense = keep(attention.output.dense, columns=kept)
    second.intermediate.dense = keep(second.intermediate.dense, rows=slice(0, 20))
    second.output.dense = keep(second.output.dense, columns=slice(0, 20))
    return host


class TestChanged:
    def test_pruned_heads_and_another_width_in_each_block(self, make_host, make_model, make_batch, reference):
        batch = make_batch()
        model = make_model(host=without_a_head_and_some_neurons(make_host()), router="static")
        widths = [(s.block, s.widths["output"]) for s in model.injection.map.sites if s.module_types == ("ffn_up",)]
        assert widths == [(0, 64), (1, 20), (2, 64)]
        with torch.no_grad():
            out, expected = model(**batch), reference(model, batch)
            torch.testing.assert_close(out.logits.double(), expected.logits, atol=1e-4, rtol=1e-4)
            model.merge()
            torch.testing.assert_close(model(**batch).logits, out.logits, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("layers", [1, 2])
    def test_blocks_cut_off_while_the_configuration_still_counts_them(self, layers, make_host, make_model, make_batch):
        host, batch = make_host(layers=4), make_batch()
        honest = make_host(layers=4)
        for one in (host, honest):
            one.encoder.layer = one.encoder.layer[:layers]
        honest.config.num_hidden_layers = layers
        with torch.no_grad():
            model, same = make_model(host=host), make_model(host=honest)
            assert torch.equal(model(**batch).logits, same(**batch).logits)
        assert host.config.num_hidden_layers == 4 and f"{layers} blocks x 32" in model.describe()

    def test_a_block_used_at_two_depths_gets_the_update_of_each(self, make_host, make_model, make_batch, reference):
        host, batch = make_host(), make_batch()
        host.encoder.layer[2] = host.encoder.layer[0]
        model = make_model(host=host)
        assert len(model.injection.map.sites) == 18 and len({s.linear for s in model.injection.map.sites}) == 12
        with torch.no_grad():
            out, expected = model(**batch), reference(model, batch)
        torch.testing.assert_close(out.logits.double(), expected.logits, atol=1e-4, rtol=1e-4)
        static = make_model(host=host, router="static")
        with pytest.raises(MergeError, match="shared between depths"):
            static.merge()

    def test_deeper_version_of_the_same_model(self, make_host, make_model, make_batch, tmp_path):
        make_model().save_pretrained(tmp_path)
        deeper = load(tmp_path, host=make_host(layers=5))
        assert "30/30 sites" in deeper.describe()
        with torch.no_grad():
            assert torch.isfinite(deeper(**make_batch()).logits).all()

    def test_quantised(self, make_host, make_model, make_batch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch is going to move its quantisation elsewhere
            quantised = torch.ao.quantization.quantize_dynamic(make_host(), {nn.Linear}, dtype=torch.qint8)
            assert fingerprint(quantised) != fingerprint(make_host())
            batch = make_batch()
            with torch.no_grad():
                plain = quantised(**batch).last_hidden_state
                model, exact = make_model(host=quantised), make_model()
                assert "18/18 sites" in model.describe()
                out, near = (m(**batch, output_hidden_states=True).hidden_states[-1] for m in (model, exact))
                assert (out - near).norm() < 0.25 * (near - exact.host(**batch).last_hidden_state).norm()
                static = make_model(host=quantised, router="static", seed=1)
                with pytest.raises(MergeError, match="quantised"):
                    static.merge()
                static.detach()
                assert torch.equal(model.detach()(**batch).last_hidden_state, plain)

    def test_tied_to_the_head_of_a_task_model(self, make_model, make_batch):
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        whole = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=40, pad_token_id=1, **shape)).eval()
        tied = whole.cls.predictions.decoder.weight
        assert tied is whole.bert.embeddings.word_embeddings.weight
        batch = make_batch()
        with torch.no_grad():
            before = whole(**batch).logits
            model = make_model(host=whole, router="static")
            model.merge()
            assert not torch.equal(whole(**batch).logits, before)
            model.detach()
            assert torch.equal(whole(**batch).logits, before)
        assert tied is whole.bert.embeddings.word_embeddings.weight and tied.requires_grad

    def test_what_was_frozen_stays_so_and_dropout_comes_back(self, make_host, make_model, make_batch):
        host = make_host().train()
        host.embeddings.requires_grad_(False)
        host.encoder.layer[1].eval()
        flags = [p.requires_grad for p in host.parameters()], [m.training for m in host.modules()]
        model = make_model(host=host)
        model.train()(**make_batch(), labels=make_batch()["input_ids"] % 5).loss.backward()
        assert not any(m.training for m in host.modules())
        model.detach()
        assert ([p.requires_grad for p in host.parameters()], [m.training for m in host.modules()]) == flags

    def test_moved_and_halved_on_the_way(self, make_model, make_batch):
        """to(…) moves adapter and host together; the host keeps the new dtype and device after detach."""
        model, batch = make_model(), make_batch()
        model.to("cpu").to(torch.bfloat16)
        with torch.no_grad():
            assert torch.isfinite(model(**batch).logits).all()
        assert next(model.detach().parameters()).dtype == torch.bfloat16

    def test_encoder_and_decoder_by_name(self, make_model, make_batch, tmp_path):
        config = T5Config(vocab_size=40, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8, pad_token_id=1)
        whole = T5Model(config).eval()
        whole.save_pretrained(tmp_path)
        model = make_model(host=load_host(str(tmp_path)))
        with torch.no_grad():
            plain = whole.encoder(**make_batch()).last_hidden_state
            torch.testing.assert_close(model.host(**make_batch()).last_hidden_state, plain)
        assert "12/12 sites" in model.describe()

    def test_multiply_adds_of_shared_blocks_count_at_each_depth(self, make_host):
        """Of grouped convolutions, only the existing weights count."""
        bert = 3 * (4 * 32 * 32 + 2 * 32 * 64)
        assert linear_multiply_adds(make_host("bert")) == bert
        assert linear_multiply_adds(make_host("albert")) == bert + 16 * 32  # and the map of its embeddings
        squeezed = 3 * (4 * 32 * 32 - 32 * 32 // 2 + 32 * 64 // 4 + 32 * 64)
        assert linear_multiply_adds(make_host("squeezebert", k_groups=1, v_groups=1, output_groups=1)) == squeezed


class TestSentenceTransformers:
    @pytest.mark.parametrize("inner", ["", "0_Transformer"])
    def test_folder(self, inner, tiny_host, tmp_path):
        """A sentence-transformers folder with the transformers model at its root or in a subfolder (older folders)."""
        shutil.copytree(tiny_host, tmp_path / "st" / inner, dirs_exist_ok=True)
        modules = [{"idx": 0, "name": "0", "path": inner, "type": "sentence_transformers.models.Transformer"}]
        (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
        host = load_host(str(tmp_path / "st"))
        assert fingerprint(host) == fingerprint(load_host(str(tiny_host)))
        assert len(load_tokenizer(str(tmp_path / "st"))) == len(tiny_tokenizer())

    def test_object(self, make_host):
        class SentenceTransformer(nn.Sequential):
            @property
            def transformers_model(self):
                return self[0]

        host = make_host()
        assert encoder_of(SentenceTransformer(host, nn.Identity())) is host


CONVBERT = {
    "block": "encoder.layer.{}",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
}


class TestOwnLayout:
    @pytest.mark.parametrize("layout", [CONVBERT, HostLayout(**CONVBERT)])
    def test_is_saved_with_the_adapter(self, layout, make_host, make_batch, stir, tmp_path):
        host, batch = make_host("convbert"), make_batch()
        config = UniHyperLoraConfig(pathway="inject", atoms=12, anchor_dim=8)
        model = UniHyperLoraForTokenClassification.from_host(host, labels=LABELS, config=config, layout=layout)
        stir(model.eval()).save_pretrained(tmp_path)
        assert "18/18 sites" in model.describe()
        loaded = load(tmp_path, host=make_host("convbert"))
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert "18/18 sites" in load(tmp_path, host=make_host("bert")).describe()  # another family has its own

    def test_given_when_loading(self, make_model, make_host, tmp_path):
        make_model().save_pretrained(tmp_path)
        with pytest.raises(HostError, match="convbert.*layout="):
            load(tmp_path, host=make_host("convbert"))
        assert "18/18" in load(tmp_path, host=make_host("convbert"), layout=CONVBERT).describe()

    def test_roles_that_a_family_lacks_are_counted_as_missing(self, make_host, make_batch, stir):
        layout = HostLayout("encoder.layer.{}", ffn_up="intermediate.dense", ffn_down="output.dense")
        config = UniHyperLoraConfig(pathway="inject", atoms=12, anchor_dim=8)
        host = make_host("fnet")
        model = UniHyperLoraForTokenClassification.from_host(host, labels=LABELS, config=config, layout=layout).eval()
        assert "6/18 sites" in model.describe()
        with torch.no_grad():
            before = model(**make_batch(), output_hidden_states=True).hidden_states[-1]
            after = stir(model)(**make_batch(), output_hidden_states=True).hidden_states[-1]
        assert not torch.allclose(before, after, atol=1e-3)

    @pytest.mark.parametrize(
        "layout,match",
        [
            ({}, "must have 'block'"),
            ("encoder", "must have 'block'"),
            ({"block": "encoder.layer.{}", "querry": "x"}, "got .*querry"),
            ({"block": "encoder.layer"}, "needs {} for the block's number"),
            ({"block": "encoder.layer.{}", "query": 3}, "query=3"),
            ({"block": "encoder.layer.{}", "query": [""]}, "query="),
            ({"block": "encoder.layer.{}", "mergeable": "yes"}, "mergeable='yes'"),
        ],
    )
    def test_what_is_no_layout(self, layout, match, make_host):
        host = make_host("convbert")
        with pytest.raises(ConfigError, match=match):
            UniHyperLoraForTokenClassification.from_host(
                host, labels=LABELS, config=UniHyperLoraConfig(pathway="inject"), layout=layout
            )
        with pytest.raises(ConfigError, match=match):
            UniHyperLoraConfig(pathway="inject", host_layouts={"convbert": layout})

    def test_paths_that_are_not_there(self, make_host):
        for layout, match in (
            ({"block": "blocks.{}"}, r"ConvBertModel has no 'blocks.\{\}'"),
            ({"block": "encoder.layer.{}", "query": ["a", "b"]}, "Block 0 .* has no 'a or b'"),
            ({"block": "encoder.layer.{}", "query": "attention.self.key_conv_attn_layer"}, "a SeparableConv1D"),
        ):
            host = make_host("convbert")
            with pytest.raises(HostError, match=match):
                UniHyperLoraForTokenClassification.from_host(
                    host, labels=LABELS, config=UniHyperLoraConfig(pathway="inject"), layout=layout
                )
            assert all(p.requires_grad for p in host.parameters())


class TestTogether:
    def test_one_file_on_two_hosts_at_once(self, make_model, make_host, make_batch, tmp_path):
        make_model().save_pretrained(tmp_path)
        batch, hosts = make_batch(), [make_host("bert", width=48), make_host("albert", layers=5)]
        with torch.no_grad():
            alone = [load(tmp_path, host=copy.deepcopy(host))(**batch).logits for host in hosts]
            models = [load(tmp_path, host=host) for host in hosts]
            models[0].adapter.atoms_out.latent.add_(0)
            assert all(torch.equal(m(**batch).logits, a) for m, a in zip(models, alone, strict=True))

    def test_a_merged_host_takes_no_other_adapter(self, make_model, make_host):
        host = make_host()
        first = make_model(host=host, router="static")
        first.merge()
        with pytest.raises(HostError, match="merged into this host"):
            make_model(host=host)
        first.unmerge()
        second = make_model(host=host, router="static")
        for model in (first, second):
            with pytest.raises(MergeError, match="2 adapters are on this host"):
                model.merge()
        second.detach()
        first.merge()
        first.detach()
        assert all(p.requires_grad for p in host.parameters()) and "_unihyperlora_hold" not in vars(host)

    def test_an_adapter_dropped_without_detach_does_not_keep_the_host(self, make_model, make_host):
        host = make_host()
        make_model(host=host)
        model = make_model(host=host)
        model.detach()
        assert all(p.requires_grad for p in host.parameters())

    def test_threads(self, make_model, make_host, make_batch):
        """Two adapters and the bare host, all on one module from six threads at once."""
        host = make_host()
        first, second = make_model(host=host, seed=1), make_model(host=host, seed=2)
        calls = [
            lambda batch: first(**batch).logits,
            lambda batch: second(**batch).logits,
            lambda batch: host(**batch).last_hidden_state,
        ]
        batches = [make_batch(tokens=5 + i, seed=i) for i in range(6)]
        with torch.no_grad():
            expected = [[call(batch) for batch in batches] for call in calls]
        wrong, start = [], threading.Barrier(6)

        def work(number: int) -> None:
            start.wait()
            with torch.no_grad():
                for turn in range(24):
                    which, batch = number % 3, (number + turn) % 6
                    if not torch.allclose(calls[which](batches[batch]), expected[which][batch], atol=1e-5):
                        wrong.append((number, turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and first.injection.current is None


def test_a_host_has_the_layers_that_it_returns(make_host):
    """An unknown encoder whose config states a wrong number of layers."""
    host = make_host("rembert")
    host.config.num_hidden_layers = 2
    host.encoder.layer = host.encoder.layer[:1]
    assert WordReader(host, tiny_tokenizer()).num_layers == 1


def test_states_of_another_width_than_the_configuration_says_are_refused(make_host):
    host = make_host("rembert")
    host.config.hidden_size = 16
    with pytest.raises(HostError, match=r"RemBertModel returns hidden states of shapes .*32.*16\) after every block"):
        WordReader(host, tiny_tokenizer())


@pytest.mark.slow
def test_machine_code_computes_with_the_values_of_the_file(make_model, make_batch):
    """Inductor fuses casts; the rounding of stored values must not be fused away."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(torch.compile(model)(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("positions", [-1, 0])
def test_a_host_without_a_largest_position(positions, make_host):
    """XLNet has -1 because its positions are relative."""
    host = make_host("deberta-v2")
    host.config.max_position_embeddings = positions
    assert torch.isfinite(
        word_states(host, WordReader(host, tiny_tokenizer()), [["anna", "lives", "in", "oslo"]], [0, 3])
    ).all()


def test_input_that_the_host_does_not_read(make_model, make_batch):
    with pytest.raises(ConfigError, match="This host reads input_ids; the call gave nothing"):
        make_model()()
    model = make_model("vit", cls=UniHyperLoraForSequenceClassification)
    with pytest.raises(ConfigError, match="reads pixel_values; the call gave .'input_ids'."):
        model(**make_batch())


def test_task_model_with_its_own_labels(make_host, make_model, make_batch):
    config = make_host("electra").config
    config.num_labels = 7
    whole = AutoModelForTokenClassification.from_config(config).eval()
    batch = make_batch()
    with torch.no_grad():
        before = whole(**batch).logits
        model = make_model(host=whole)
        assert model(**batch).logits.shape[-1] == 5 and model.host is whole.electra
        assert torch.equal(model.detach()(**batch).last_hidden_state, whole.electra(**batch).last_hidden_state)
        assert torch.equal(whole(**batch).logits, before)
