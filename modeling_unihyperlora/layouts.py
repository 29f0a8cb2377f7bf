"""Where a host keeps its blocks, and which of a block's linear layers play which role.

A family is one entry in ``LAYOUTS``, by its ``config.model_type``. Paths of layers count from the block; one with
``{}``, the block's number, counts from the host, for families that keep a block's layers apart. The stream needs none
of this: it takes any encoder that returns its hidden states.
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

    Several paths for a role mean all of them that a block has (a gated FFN has two ways up); the same path for query,
    key and value means one layer for all three. An empty role is one that the family lacks.

    Args:
        block: path of block ``{}``; of several the first that the host has. Its first input is the token's state.
        query, key, value, attention_output, ffn_up, ffn_down: paths of the layers.
        fused_by_head: a layer for query, key and value has their outputs head by head, not one after the other.
        shared_blocks: the host goes through the same blocks again, ``num_hidden_layers`` in all.
        channels_first: states are (B, d, T) inside the blocks, not (B, T, d).
        mergeable: whether ΔW folded into a layer's weight computes what the update does; it does not where a layer
            serves several depths, or more than the tokens (as with relative positions), or is grouped.
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
    """A layout as a user gives it or as a configuration holds it.

    Raises:
        ConfigError: a key or a value is none of a layout.
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
            raise ConfigError(f"The layout of '{family}' has {name}={value!r}; a path, a list of paths or a bool.")
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
        block="encoder.layers.{}.attention",  # the module around it is not called, only its forward
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
