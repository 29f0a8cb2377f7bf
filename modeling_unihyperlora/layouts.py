"""Layouts of host families: the paths of a host's blocks, and the roles of the linear layers in a block.

A family is one entry in ``LAYOUTS``, keyed by its ``config.model_type``. Paths of layers start at the block. A path
with ``{}``, the block's number, starts at the host, for families that store a block's layers separately. The stream
needs no layout: it works with any encoder that returns its hidden states.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

MODULE_TYPES = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class HostLayout:
    """Attribute paths of the blocks and of the six module types in a block.

    A role may have several paths; all that exist in a block are used (a gated FFN has two up-projections). Query, key
    and value have the same path if one layer computes all three. A role that the family lacks is empty.

    Args:
        block: path of block ``{}``; of several paths, the first that exists in the host. The first input of the block
            must be the tokens' states.
        query, key, value, attention_output, ffn_up, ffn_down: paths of the layers.
        fused_by_head: a layer for query, key and value orders its outputs by head, not by query, key, value.
        shared_blocks: the host runs the same blocks repeatedly, ``num_hidden_layers`` times in total.
        channels_first: states inside the blocks are (B, d, T), not (B, T, d).
        mergeable: whether merging ΔW into a layer's weight gives the same result as the update. It does not if the
            layer is grouped, serves several depths, or also reads inputs other than tokens (relative positions).
    """

    block: Paths
    query: Paths = ()
    key: Paths = ()
    value: Paths = ()
    attention_output: Paths = ()
    ffn_up: Paths = ()
    ffn_down: Paths = ()
    fused_by_head: bool = False
    shared_blocks: bool = False
    channels_first: bool = False
    mergeable: bool = True

    def paths(self, role: str) -> tuple[str, ...]:
        value = getattr(self, role)
        return (value,) if isinstance(value, str) else tuple(value)


def layout_from(content: HostLayout | Mapping, family: str) -> HostLayout:
    """Make a ``HostLayout`` from a user's layout or from the dict in a configuration.

    Raises:
        ConfigError: a key or a value is not allowed in a layout.
    """
    if isinstance(content, HostLayout):
        content = dataclasses.asdict(content)
    fields = {field.name: field for field in dataclasses.fields(HostLayout)}
    if not isinstance(content, Mapping) or not content.keys() <= fields.keys() or "block" not in content:
        given = sorted(content) if isinstance(content, Mapping) else content
        raise ConfigError(
            f"The layout of '{family}' must have 'block' and may have {', '.join(list(fields)[1:])}; got {given}."
        )
    for name, value in content.items():
        if fields[name].type is bool:
            good = isinstance(value, bool)
        else:
            paths = [value] if isinstance(value, str) else value
            good = isinstance(paths, list | tuple) and all(isinstance(path, str) and path for path in paths)
        if not good:
            raise ConfigError(f"The layout of '{family}' has {name}={value!r}; give a path, paths or a bool.")
    layout = HostLayout(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
    if not layout.paths("block") or not all("{}" in path for path in layout.paths("block")):
        raise ConfigError(
            f"The layout of '{family}' has block={layout.block!r}; it needs {{}} for the block's number."
        )
    return layout


_BERT = HostLayout(
    block="encoder.layer.{}",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    ffn_up="intermediate.dense",
    ffn_down="output.dense",
)
_GATED = HostLayout(
    block="layers.{}",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    ffn_up=("mlp.gate_proj", "mlp.up_proj"),
    ffn_down="mlp.down_proj",
)


def _like(layout: HostLayout, **changes) -> HostLayout:
    return dataclasses.replace(layout, **changes)


LAYOUTS = {
    "albert": HostLayout(
        block="encoder.albert_layer_groups.{}.albert_layers.0",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        ffn_up="ffn",
        ffn_down="ffn_output",
        shared_blocks=True,
        mergeable=False,
    ),
    "bert": _BERT,
    "big_bird": _BERT,
    "camembert": _BERT,
    "deberta": _like(
        _BERT,
        query="attention.self.in_proj",
        key="attention.self.in_proj",
        value="attention.self.in_proj",
        fused_by_head=True,
    ),
    "deberta-v2": _like(
        _BERT,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        mergeable=False,  # with share_att_key query and key also read the relative positions
    ),
    "distilbert": HostLayout(
        block="transformer.layer.{}",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_up="ffn.lin1",
        ffn_down="ffn.lin2",
    ),
    "electra": _BERT,
    "eurobert": _GATED,
    "gemma": _GATED,
    "gpt_neox": _like(
        _GATED,
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        attention_output="attention.dense",
        ffn_up="mlp.dense_h_to_4h",
        ffn_down="mlp.dense_4h_to_h",
        fused_by_head=True,
    ),
    "llama": _GATED,
    "mistral": _GATED,
    "mobilebert": _like(
        _BERT,
        ffn_up=("intermediate.dense", *(f"ffn.{i}.intermediate.dense" for i in range(3))),
        ffn_down=("output.dense", *(f"ffn.{i}.output.dense" for i in range(3))),
    ),
    "modernbert": HostLayout(
        block="layers.{}",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        ffn_up="mlp.Wi",
        ffn_down="mlp.Wo",
    ),
    "mpnet": _like(
        _BERT,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
    ),
    "nomic_bert": _GATED,
    "opt": _like(
        _GATED,
        block="decoder.layers.{}",
        attention_output="self_attn.out_proj",
        ffn_up="fc1",
        ffn_down="fc2",
    ),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "roberta": _BERT,
    "squeezebert": HostLayout(
        block="encoder.layers.{}.attention",  # hooks on the outer module would not run: only its forward is called
        query="query",
        key="key",
        value="value",
        attention_output="encoder.layers.{}.post_attention.conv1d",
        ffn_up="encoder.layers.{}.intermediate.conv1d",
        ffn_down="encoder.layers.{}.output.conv1d",
        channels_first=True,
        mergeable=False,
    ),
    "t5": HostLayout(
        block="block.{}",
        query="layer.0.SelfAttention.q",
        key="layer.0.SelfAttention.k",
        value="layer.0.SelfAttention.v",
        attention_output="layer.0.SelfAttention.o",
        ffn_up=tuple(f"layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")),
        ffn_down="layer.1.DenseReluDense.wo",
    ),
    "vit": _like(
        _GATED,
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        attention_output="attention.o_proj",
        ffn_up="mlp.fc1",
        ffn_down="mlp.fc2",
    ),
    "xlm": HostLayout(
        block="attentions.{}",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        attention_output="out_lin",
        ffn_up="ffns.{}.lin1",
        ffn_down="ffns.{}.lin2",
    ),
    "xlm-roberta": _BERT,
}
