"""Hosts that do not support an injected update are refused unchanged; identification of hosts."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_unihyperlora import HostError, UniHyperLoraConfig, UniHyperLoraForTokenClassification, UniHyperLoraModel
from modeling_unihyperlora.hosts import call_host, encoder_of, fingerprint, load_host, window_of
from tests.modeling_unihyperlora.test_injection import LABELS, hooks_in


def test_unknown_family_names_the_known_ones_and_touches_nothing(make_host):
    host = make_host("convbert")
    with pytest.raises(HostError, match="convbert.*albert, bert.*xlm-roberta.*layout=.*pathway='stream'"):
        UniHyperLoraForTokenClassification.from_host(host, labels=LABELS, config=UniHyperLoraConfig(pathway="inject"))
    assert hooks_in(host) == 0 and all(p.requires_grad for p in host.parameters())


def test_a_linear_layer_that_is_none_is_named(make_host):
    host = make_host("bert")
    host.encoder.layer[1].intermediate.dense = nn.Identity()
    with pytest.raises(HostError, match="Block 1: 'intermediate.dense' is a Identity"):
        UniHyperLoraModel.from_host(host, config=UniHyperLoraConfig(pathway="inject"))
    del host.encoder.layer[1].intermediate.dense
    with pytest.raises(HostError, match="Block 1 .* has no 'intermediate.dense'"):
        UniHyperLoraModel.from_host(host, config=UniHyperLoraConfig(pathway="inject"))
    assert hooks_in(host) == 0 and all(p.requires_grad for p in host.parameters())


def test_feed_forward_in_chunks_is_refused(make_host):
    host = make_host()
    host.config.chunk_size_feed_forward = 2
    with pytest.raises(HostError, match="chunk_size_feed_forward=0"):
        UniHyperLoraModel.from_host(host, config=UniHyperLoraConfig(pathway="inject"))


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(HostError, match="Linear"):
        UniHyperLoraModel.from_host(nn.Linear(2, 2))


def test_an_adapter_is_no_host(make_model):
    with pytest.raises(HostError, match="give the encoder"):
        UniHyperLoraModel.from_host(make_model())


def test_bad_labels_leave_the_host_as_it_was(make_host):
    host = make_host()
    with pytest.raises(ValueError, match="twice"):
        UniHyperLoraForTokenClassification.from_host(
            host, labels=["O", "O"], config=UniHyperLoraConfig(pathway="inject")
        )
    assert hooks_in(host) == 0 and all(p.requires_grad for p in host.parameters())


def test_fingerprint_tells_weights_apart_and_nothing_else(make_host, tmp_path):
    host, other = make_host(), make_host(seed=1)
    host.save_pretrained(tmp_path)  # without a pooler, which AutoModel then draws at random
    loads = [fingerprint(load_host(str(tmp_path))) for _ in range(2)]
    assert loads == [fingerprint(host)] * 2
    assert fingerprint(other) != fingerprint(host) != fingerprint(make_host(layers=2))
    with torch.no_grad():
        host.encoder.layer[2].output.dense.weight[0, 0] += 1
    assert fingerprint(host) != loads[0]


def test_encoder_of_a_task_model_is_used(make_model, make_batch):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    whole = BertForMaskedLM(config).eval()
    batch = make_batch()
    with torch.no_grad():
        before = whole(**batch).logits
        model = make_model(host=whole)
        assert model.host is whole.bert
        model(**batch)
        assert torch.equal(whole(**batch).logits, before)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
SMALL = {"d_model": 16, "vocab_size": 9}
WINDOWS = {  # model and settings → the longest text; the tables of RoBERTa and MPNet begin at padding_idx + 1
    "Bert": (TINY | {"max_position_embeddings": 64}, 64),
    "Roberta": (TINY | {"max_position_embeddings": 66}, 64),
    "MPNet": (TINY | {"max_position_embeddings": 66}, 64),
    "Longformer": (TINY | {"max_position_embeddings": 66, "attention_window": [4]}, 64),
    "Nystromformer": (TINY | {"max_position_embeddings": 64}, 64),
    "OPT": (TINY | {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "ffn_dim": 16}, 64),
    "GPT2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 9}, 64),
    "Mpt": (SMALL | {"n_layers": 1, "n_heads": 2, "max_seq_len": 64}, 64),  # ALiBi, with a table of this length
    "Bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 9}, None),  # ALiBi
    "Llama": (TINY | {"max_position_embeddings": 64}, 64),  # rotary: what it was trained on
    "T5": (SMALL | {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, None),
    "XLNet": (SMALL | {"n_layer": 1, "n_head": 2, "d_inner": 16}, None),
}


@pytest.mark.parametrize("family", WINDOWS)
def test_the_longest_text_of_a_host_is_read_to_its_end(family):
    settings, window = WINDOWS[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    host = encoder_of(getattr(transformers, f"{family}Model")(config).eval())
    assert window_of(host) == window
    nothing_known, short = SimpleNamespace(model_max_length=10**30), SimpleNamespace(model_max_length=8)
    assert window_of(host, nothing_known) == window and window_of(host, short) == 8
    ids = torch.full((1, window or 300), 5)
    with torch.no_grad():
        assert call_host(host, None, input_ids=ids).last_hidden_state.shape[1] == ids.shape[1]


def test_weights_that_a_checkpoint_lacks_are_named_if_states_depend_on_them(make_host, tmp_path, caplog):
    make_host("bert").save_pretrained(tmp_path)
    path, metadata = tmp_path / "model.safetensors", {"format": "pt"}
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if not name.startswith("pooler.")}, path, metadata)
    load_host(str(tmp_path))
    assert not caplog.records
    kept = {name: value for name, value in tensors.items() if "layer.1." not in name}
    save_file(kept, path, metadata)
    load_host(str(tmp_path))
    [record] = caplog.records
    assert f"lacks {len(tensors) - len(kept)} weights (encoder.layer.1." in record.getMessage()
