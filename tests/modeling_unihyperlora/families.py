"""Tiny random hosts of every family, made from configurations."""

import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from modeling_unihyperlora.hosts import encoder_of

VOCABULARY = 40
_NO_DROPOUT = ("dropout", "dropout_prob", "dropout_rate", "drop_rate")
DECODERS = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")
_STREAM_ONLY = {
    "convbert": {},
    "fnet": {},
    "gpt2": {},
    "longformer": {"attention_window": 4},
    "nystromformer": {},
    "rembert": {},
}
_MORE = {  # what a family's configuration needs beside the common shape
    "albert": {"embedding_size": 16},
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
    },
    "electra": {"embedding_size": 16},
    "eurobert": {"num_key_value_heads": 2},
    "gemma": {"head_dim": 8, "num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 32, "dropout": 0.0},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mobilebert": {
        "embedding_size": 16,
        "true_hidden_size": 16,
        "intra_bottleneck_size": 16,
        "normalization_type": "layer_norm",
    },
    "modernbert": {"sliding_window": 4},
    "squeezebert": {"q_groups": 2, "intermediate_groups": 4},
    "t5": {"feed_forward_proj": "gated-gelu"},
    "vit": {"image_size": 8, "patch_size": 4},
    "xlm": {"n_langs": 1, "max_position_embeddings": 64},
}
_NAMES = {  # of the common shape, where they are others: width, blocks, heads, inner width
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim"),
    "gpt2": ("n_embd", "n_layer", "n_head", "n_inner"),
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
    "t5": ("d_model", "num_layers", "num_heads", "d_ff"),
    "xlm": ("emb_dim", "n_layers", "n_heads", None),
}
_COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
STREAM_ONLY = sorted(_STREAM_ONLY)


def tiny_host(
    family: str = "bert", width: int = 32, layers: int = 3, seed: int = 0, inner: int | None = None, **changes
) -> nn.Module:
    """A random encoder of a family without dropout, in evaluation mode; its tokens have clearly different states."""
    shape = dict(zip(_NAMES.get(family, _COMMON), (width, layers, 4, inner or 2 * width), strict=True))
    shape.pop(None, None)
    if family == "t5":
        shape["d_kv"] = width // 4
    if family == "squeezebert":
        shape["embedding_size"] = width
    more = {"vocab_size": VOCABULARY, "pad_token_id": 1} | _STREAM_ONLY.get(family, {}) | _MORE.get(family, {})
    config = AutoConfig.for_model(family, **shape, **(more | changes))
    for name in dir(config):
        if name.endswith(_NO_DROPOUT) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        host = encoder_of(AutoModel.from_config(config))
        for name, parameter in host.named_parameters():  # transformers' 0.02 would leave all tokens nearly alike
            if "embeddings" in name or "embed_" in name or name.startswith("wte") or name.startswith("tok_"):
                nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return host.eval()
