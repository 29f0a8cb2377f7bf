"""The sites of an injected update: a host's blocks and the linear layers in them."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .errors import HostError
from .hosts import describe_host, dtype_of
from .layouts import LAYOUTS, MODULE_TYPES, HostLayout, layout_from


@dataclass(frozen=True)
class Site:
    """A linear layer that gets an update: its block 0…L-1, the module types that it serves, and the layer.

    A fused layer serves query, key and value. Its outputs have ``groups`` groups (1, or one per attention head), each
    with the query's, the key's and the value's part.
    """

    block: int
    module_types: tuple[str, ...]
    linear: nn.Module
    groups: int = 1

    @property
    def widths(self) -> dict[str, int]:
        """Width of the layer's input, and of its output for one module type."""
        inward, outward = _widths(self.linear)
        return {"input": inward, "output": outward // len(self.module_types)}

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Join outputs of the module types, each (…, w), to (…, outputs of the layer) in the layer's order."""
        if len(parts) == 1:
            return parts[0]
        return torch.stack([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-2).flatten(-3)


class HostMap:
    """The blocks and sites of one encoder.

    Args:
        host: an encoder.
        layouts: host family → layout; overrides ``LAYOUTS``.

    Attributes:
        blocks: L modules; a block that the host runs several times appears several times.
        sites: all linear layers that can get an update, block by block.

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
                "pathway='stream', which needs no layout."
            )
        if getattr(host.config, "chunk_size_feed_forward", 0):
            raise HostError(
                "The host computes its feed-forward layers in chunks, so they do not read whole sentences. Load the "
                "host with chunk_size_feed_forward=0."
            )
        self.blocks = _blocks(host, self.layout)
        if not self.blocks:
            raise HostError(
                f"{type(host).__name__} has no '{self.layout.block}', where its layout expects the blocks. Pass the "
                "encoder itself, or a layout=HostLayout(…) for it."
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
        """Relative depth ℓ/L of a block in (0, 1]; ℓ counts from 1."""
        return (block + 1) / len(self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def coverage(self) -> str:
        """Number of module types found, out of six per block, such as "24/24"."""
        return (
            f"{len({(site.block, role) for site in self.sites for role in site.module_types})}/{6 * len(self.blocks)}"
        )

    def mergeable(self) -> bool:
        """Whether ΔW can be merged: weights are plain floats, and each serves one site and only tokens."""
        weights = (site.linear.weight for site in self.sites)
        plain = all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights)
        alone = len({site.linear for site in self.sites}) == len(self.sites)
        return self.layout.mergeable and plain and alone


def layout_of(host: nn.Module, layouts: dict[str, dict] | None = None) -> HostLayout | None:
    """Layout of a host's family: the user's, else the package's, else None."""
    family = host.config.model_type
    own = (layouts or {}).get(family)
    return LAYOUTS.get(family) if own is None else layout_from(own, family)


def num_layers_of(host: nn.Module) -> int:
    """L, the number of blocks. It is counted if the layout is known, since a pruned host may state its old number."""
    layout = layout_of(host)
    return len(_blocks(host, layout)) if layout else host.config.num_hidden_layers


def linear_multiply_adds(host: nn.Module) -> int:
    """Multiply-adds per token of a host's linear layers, without the pooler; shared blocks count once per use."""
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
    """The layers of one role in block ``index``; ``number`` is the block's module number in the host.

    Raises:
        HostError: no path exists in the block, or one does not lead to a linear layer.
    """
    found = [_find(host, path.format(number)) if "{}" in path else _find(block, path) for path in paths]
    found = [(path, layer) for path, layer in zip(paths, found, strict=True) if layer is not None]
    if paths and not found:
        raise HostError(
            f"Block {index} ({type(block).__name__}) has no '{' or '.join(paths)}', which its layout names. Pass a "
            "layout=HostLayout(…) for this host, or use pathway='stream'."
        )
    for path, layer in found:
        if _widths(layer) is None:
            raise HostError(
                f"Block {index}: '{path}' is a {type(layer).__name__}, but the update needs a linear layer. Load the "
                "host without wrapped layers."
            )
    return [layer for _, layer in found]


def _find(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer, also a quantised one, or of a convolution with kernel size 1."""
    if isinstance(layer, nn.Conv1d):
        return (layer.in_channels, layer.out_channels) if layer.kernel_size == (1,) else None
    inward, outward = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (inward, outward) if isinstance(inward, int) and isinstance(outward, int) else None


# ---- the host's identity ----


def identify_host(host: nn.Module, num_layers: int) -> dict[str, object]:
    """Description that identifies a host, wherever it was loaded from: family, sizes, weights and their precision."""
    described = describe_host(host, None, num_layers) | {"dtype": str(dtype_of(host))}
    del described["name"]
    return described


def unlike(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Keys in which two descriptions from ``identify_host`` differ; empty if they describe the same host.

    Weights are compared only if both have the same precision.
    """
    compared = set(one) - ({"fingerprint", "dtype"} if one["dtype"] != other["dtype"] else set())
    return sorted(name for name in compared if one[name] != other[name])


def is_among(host: nn.Module, num_layers: int, described: list[dict[str, object]]) -> bool:
    """Whether one of the descriptions (from ``describe_host``) is of this host; compares weights only in float32."""
    names = ("family", "hidden_size", "num_layers", "fingerprint")[: 4 if dtype_of(host) == torch.float32 else 3]
    own = describe_host(host, None, num_layers)
    return any(all(known.get(name) == own[name] for name in names) for known in described)
