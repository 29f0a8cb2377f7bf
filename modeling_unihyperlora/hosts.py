"""The host: its blocks and the sites of the update in them, loading it, and leaving it as it was."""

import contextlib
import functools
import hashlib
import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel
from transformers.integrations import deepspeed

from .errors import HostError, first_line
from .layouts import LAYOUTS, MODULE_TYPES, HostLayout, layout_from

_NO_LENGTH = 10**9  # a tokenizer that knows no length states 1e30
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # tables of learned positions


@dataclass(frozen=True)
class Site:
    """One linear layer that takes an update: block 0…L-1, the module types it serves, the layer itself.

    A layer for query, key and value at once serves three; its outputs are theirs, in ``groups`` runs of each.
    """

    block: int
    module_types: tuple[str, ...]
    linear: nn.Module
    groups: int = 1

    @property
    def widths(self) -> dict[str, int]:
        """Width of its input, and of the output for one module type."""
        inward, outward = _widths(self.linear)
        return {"input": inward, "output": outward // len(self.module_types)}

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Values of the module types (…, w) → (…, outputs of the layer), in the layer's order."""
        if len(parts) == 1:
            return parts[0]
        return torch.stack([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-2).flatten(-3)


class HostMap:
    """The blocks and sites of one encoder.

    Args:
        host: an encoder.
        layouts: layouts by family, which go before those of ``LAYOUTS``.

    Attributes:
        blocks: L modules; one that the host goes through several times is there several times.
        sites: all linear layers that take an update, block by block.

    Raises:
        HostError: the family is unknown, or a block lacks a linear layer that its layout names.
    """

    def __init__(self, host: nn.Module, layouts: dict[str, dict] | None = None):
        self.family = host.config.model_type
        self.layout = layout_of(host, layouts)
        if self.layout is None:
            raise HostError(
                f"Host family '{self.family}' ({type(host).__name__}) has no layout, so the injected update does not "
                f"know its linear layers. Known families: {', '.join(LAYOUTS)}. Pass layout=HostLayout(…), or use "
                "pathway='stream', which needs none."
            )
        if getattr(host.config, "chunk_size_feed_forward", 0):
            raise HostError(
                "The host computes its feed-forward layers in chunks, so they do not see whole sentences. Load it "
                "with chunk_size_feed_forward=0."
            )
        self.blocks = _blocks(host, self.layout)
        if not self.blocks:
            raise HostError(
                f"No '{self.layout.block}' in {type(host).__name__}: it has no blocks where they should be."
            )
        self.sites = list(self._find_sites(host))
        self.hidden_size: int = host.config.hidden_size

    def _find_sites(self, host: nn.Module) -> Iterator[Site]:
        heads = host.config.num_attention_heads if self.layout.fused_by_head else 1
        modules = len(dict.fromkeys(self.blocks))
        for index, block in enumerate(self.blocks):
            number = index * modules // len(self.blocks) if self.layout.shared_blocks else index
            found: dict[nn.Module, tuple[str, ...]] = {}
            for role in MODULE_TYPES:
                for linear in _layers(host, block, self.layout.paths(role), index, number):
                    found[linear] = (*found.get(linear, ()), role)
            for linear, roles in found.items():
                yield Site(index, roles, linear, heads if len(roles) > 1 else 1)

    def depth(self, block: int) -> float:
        """Relative depth ℓ/L of a block, its number ℓ counted from 1: in (0, 1]."""
        return (block + 1) / len(self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def coverage(self) -> str:
        """Module types found in all blocks, of six a block: "24/24"."""
        return (
            f"{len({(site.block, role) for site in self.sites for role in site.module_types})}/{6 * len(self.blocks)}"
        )

    def mergeable(self) -> bool:
        """Whether a weight can take ΔW in: plain floating weights, each for one place and for tokens alone."""
        weights = (site.linear.weight for site in self.sites)
        plain = all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights)
        alone = len({site.linear for site in self.sites}) == len(self.sites)
        return self.layout.mergeable and plain and alone


def layout_of(host: nn.Module, layouts: dict[str, dict] | None = None) -> HostLayout | None:
    """The layout of a host's family: the user's, else the package's, else None."""
    family = host.config.model_type
    own = (layouts or {}).get(family)
    return LAYOUTS.get(family) if own is None else layout_from(own, family)


def num_layers_of(host: nn.Module) -> int:
    """L. The blocks are counted where they are known: a pruned host may still state its old number."""
    layout = layout_of(host)
    return len(_blocks(host, layout)) if layout else host.config.num_hidden_layers


def linear_multiply_adds(host: nn.Module) -> int:
    """Multiply-adds a token of a host's linear layers but the pooler's; a shared block's count at each depth."""
    layout = layout_of(host)
    uses = Counter(_blocks(host, layout) if layout else [])
    times = {module: number for block, number in uses.items() for module in block.modules()}
    total = 0
    for name, module in host.named_modules():
        if "pooler" not in name and (widths := _widths(module)) is not None:
            total += math.prod(widths) // getattr(module, "groups", 1) * times.get(module, 1)
    return total


def _blocks(host: nn.Module, layout: HostLayout) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for path in layout.paths("block"):
        while (block := _find(host, path.format(len(blocks)))) is not None:
            blocks.append(block)
        if blocks:
            break
    if layout.shared_blocks and blocks:
        total = host.config.num_hidden_layers
        blocks = [blocks[number * len(blocks) // total] for number in range(total)]
    return blocks


def _layers(host: nn.Module, block: nn.Module, paths: tuple[str, ...], index: int, number: int) -> list[nn.Module]:
    """The layers of one role in a block; ``number`` is that of its module in the host."""
    found = [_find(host, path.format(number)) if "{}" in path else _find(block, path) for path in paths]
    found = [(path, layer) for path, layer in zip(paths, found, strict=True) if layer is not None]
    if paths and not found:
        raise HostError(f"No '{' or '.join(paths)}' in block {index} ({type(block).__name__}).")
    for path, layer in found:
        if _widths(layer) is None:
            raise HostError(
                f"Block {index}: '{path}' is a {type(layer).__name__}, a linear layer is needed. Load the host "
                "unwrapped."
            )
    return [layer for _, layer in found]


def _find(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer (quantised ones state them too) or of a convolution of width 1."""
    if isinstance(layer, nn.Conv1d):
        return (layer.in_channels, layer.out_channels) if layer.kernel_size == (1,) else None
    inward, outward = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (inward, outward) if isinstance(inward, int) and isinstance(outward, int) else None


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder inside a task model (…ForMaskedLM, …ForTokenClassification), or the model itself.

    Of an encoder and decoder it is the encoder, of a SentenceTransformer its transformers model.
    """
    model = getattr(model, "transformers_model", None) or model
    if not hasattr(model, "config"):
        raise HostError(
            f"A host must be a transformers model or the name of one; got {type(model).__name__}, which has no config."
        )
    if model.config.model_type == "unihyperlora":
        raise HostError("A UniHyperLoRA adapter was given as the host; give the encoder that it should sit on.")
    model = getattr(model, "base_model", model)
    if (
        getattr(model.config, "is_encoder_decoder", False) or _find(model, "encoder.block.0") is not None
    ):  # T5: its encoder alone
        model = model.get_encoder()
    return model


def load_host(name_or_path: str | None, **kwargs) -> nn.Module:
    """Load a frozen host with ``AutoModel``, from safetensors; its repository's own code is never run.

    Args:
        name_or_path: a Hub id or a folder.
        **kwargs: ``revision``, ``dtype``, ``cache_dir``, ``token``, ``local_files_only``.

    Raises:
        HostError: no host was named, or it cannot be loaded.
    """
    if not name_or_path:
        raise HostError(
            "The adapter does not say which host to use. Pass base_model_name_or_path='a Hub id or a folder' "
            "or host=a_loaded_encoder."
        )
    try:
        with _whole():
            return AutoModel.from_pretrained(
                transformers_folder(name_or_path), trust_remote_code=False, use_safetensors=True, **kwargs
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise HostError(
            f"The host '{name_or_path}' cannot be loaded ({first_line(error)}). Pass "
            "base_model_name_or_path='a Hub id or a folder' or host=a_loaded_encoder; a host whose repository needs "
            "its own code, or has no safetensors file, has to be loaded by you and passed as host=."
        ) from error


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Within it transformers loads a model whole also under DeepSpeed's ZeRO-3, not each process its share.

    By its weights a host is told from others, and a stream reads with it before training; which shares them out then.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    asked = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(asked)


def transformers_folder(name_or_path: str) -> str:
    """Where in a folder of sentence-transformers its transformers model lies; any other name as it is."""
    try:
        modules = json.loads((Path(name_or_path) / "modules.json").read_text(encoding="utf-8"))
        inner = Path(name_or_path) / modules[0]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return str(name_or_path)
    return str(inner) if (inner / "config.json").is_file() else str(name_or_path)


def window_of(host: nn.Module, tokenizer=None) -> int | None:
    """Most sub-tokens, special ones included, that a host is to read at once; None where nothing limits it.

    The least of three: what the tokenizer states; what the configuration states (of a rotary host the context that it
    was trained on); and the table of learned positions, whose first rows some families leave out: RoBERTa's 514 rows
    are 512 positions. T5, XLNet and hosts with ALiBi have relative positions, so that the tokenizer alone limits them.

    Args:
        host: an encoder or decoder, or a task model on one.
        tokenizer: its tokenizer, if it is to count.
    """
    stated = getattr(tokenizer, "model_max_length", None)
    limits = [] if stated is None or stated >= _NO_LENGTH else [int(stated)]
    config = host.config.get_text_config() if hasattr(host.config, "get_text_config") else host.config
    for name in ("max_position_embeddings", "max_seq_len"):  # XLNet says -1
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0 and not getattr(config, "alibi", False):
            limits.append(most)
    for name, module in host.named_modules():
        table = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (table in _POSITIONS or table.endswith("position_embeddings")):
            skipped = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - skipped)
    return min(limits, default=None)


@functools.cache  # a signature takes as long as a small layer
def _arguments(host: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(host.forward).parameters)


def call_host(host: nn.Module, attention_mask: torch.Tensor | None, **inputs):
    """The host's forward, without what it does not take (FNet has no mask); a decoder keeps no keys and values."""
    known = (_arguments.__wrapped__ if torch.compiler.is_compiling() else _arguments)(type(host))
    if attention_mask is not None and "attention_mask" in known:
        inputs["attention_mask"] = attention_mask
    if "use_cache" in known:
        inputs["use_cache"] = False
    return host(return_dict=True, **inputs)


def check_states(host: nn.Module, hidden_states: tuple[torch.Tensor, ...] | None, input_ids: torch.Tensor) -> None:
    """Raise ``HostError`` unless a host returned L+1 states (B, T, d) for ids (B, T): all that the stream needs."""
    layers, shape = num_layers_of(host), (*input_ids.shape, host.config.hidden_size)
    found = [tuple(state.shape) for state in hidden_states or ()]
    if len(found) != layers + 1 or any(state != shape for state in found):
        raise HostError(
            f"{type(host).__name__} returns {len(found)} hidden states of shapes {sorted(set(found))}; the stream "
            f"needs {layers + 1} (num_hidden_layers + 1) of {shape}. If the host was changed, correct its config."
        )


def fingerprint(host: nn.Module, values_a_tensor: int = 4096) -> str:
    """SHA-256 (16 hex digits) over names, shapes and evenly spaced values of the host's weights.

    Two hosts of one name but different weights (pruned, fine-tuned further) get different fingerprints. The pooler
    does not count: no state depends on it, and where a checkpoint has none transformers draws a random one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_plain_state(host).items()):
        if name.startswith("pooler."):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = (tensor.dequantize() if tensor.is_quantized else tensor).detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // values_a_tensor)].cpu().float()
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_state(host: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict's tensors; those that a quantised layer keeps packed are taken out of their packing."""
    state = {}
    for name, value in host.state_dict().items():
        for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, torch.Tensor):
                state[f"{name}.{number}" if isinstance(value, tuple) else name] = part
    return state


def describe_host(host: nn.Module, name: str | None) -> dict[str, object]:
    """What an adapter records of a host that it was trained on."""
    return {
        "name": name,
        "family": host.config.model_type,
        "hidden_size": host.config.hidden_size,
        "num_layers": num_layers_of(host),
        "fingerprint": fingerprint(host),
    }


def identify_host(host: nn.Module) -> dict[str, object]:
    """What tells a host from others, wherever it was loaded from: family, sizes, weights and their precision."""
    described = describe_host(host, None) | {"dtype": str(dtype_of(host))}
    del described["name"]
    return described


def unlike(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """In what two descriptions by ``identify_host`` differ; none if they are of one host.

    Weights are compared where they have the same precision; else family and sizes have to do.
    """
    compared = set(one) - ({"fingerprint", "dtype"} if one["dtype"] != other["dtype"] else set())
    return sorted(name for name in compared if one[name] != other[name])


def is_among(host: nn.Module, described: list[dict[str, object]]) -> bool:
    """Whether ``describe_host`` described this host: by family, sizes, and weights where they are in float32."""
    names = ("family", "hidden_size", "num_layers", "fingerprint")[: 4 if dtype_of(host) == torch.float32 else 3]
    own = describe_host(host, None)
    return any(all(known.get(name) == own[name] for name in names) for known in described)


def dtype_of(host: nn.Module) -> torch.dtype:
    return next(host.parameters()).dtype
