"""What a host is made of: where its blocks are and which linear layers play which role in them.

Adding a family is one entry in ``LAYOUTS``; paths are relative to the encoder (blocks) and to a block (roles).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer

from .errors import HostError, first_line

MODULE_TYPES = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class HostLayout:
    """Attribute paths of the blocks and of the six module types inside one block."""

    blocks: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_up: str
    ffn_down: str


LAYOUTS = {
    "bert": HostLayout(
        blocks="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        ffn_up="intermediate.dense",
        ffn_down="output.dense",
    ),
    "distilbert": HostLayout(
        blocks="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_up="ffn.lin1",
        ffn_down="ffn.lin2",
    ),
    "mpnet": HostLayout(
        blocks="encoder.layer",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        ffn_up="intermediate.dense",
        ffn_down="output.dense",
    ),
}


@dataclass(frozen=True)
class Site:
    """One linear layer that takes an update: block 0…L-1, module type, the layer itself."""

    block: int
    module_type: str
    linear: nn.Linear


class HostMap:
    """The blocks and sites of one encoder.

    Args:
        host: an encoder of a family in ``LAYOUTS``.

    Raises:
        HostError: the family is unknown, or a block lacks a linear layer that its layout names.
    """

    def __init__(self, host: nn.Module):
        self.family = host.config.model_type
        if self.family not in LAYOUTS:
            raise HostError(
                f"Host family '{self.family}' ({type(host).__name__}) has no layout, so the injected update does not "
                f"know its linear layers. Known families: {', '.join(LAYOUTS)}. Add one to hosts.LAYOUTS."
            )
        if getattr(host.config, "chunk_size_feed_forward", 0):
            raise HostError(
                "The host computes its feed-forward layers in chunks, so they do not see whole sentences. Load it "
                "with chunk_size_feed_forward=0."
            )
        layout = LAYOUTS[self.family]
        self.blocks: list[nn.Module] = list(_submodule(host, layout.blocks, "the host"))
        self.sites = list(self._find_sites(layout))
        self.hidden_size: int = host.config.hidden_size

    def _find_sites(self, layout: HostLayout) -> Iterator[Site]:
        for index, block in enumerate(self.blocks):
            for module_type in MODULE_TYPES:
                linear = _submodule(block, getattr(layout, module_type), f"block {index}")
                if not isinstance(linear, nn.Linear):
                    raise HostError(
                        f"Block {index}: '{getattr(layout, module_type)}' is a {type(linear).__name__}, "
                        "a linear layer is needed. Load the host unquantised and unwrapped."
                    )
                yield Site(index, module_type, linear)

    def depth(self, block: int) -> float:
        """Relative depth ℓ/L of a block, its number ℓ counted from 1: in (0, 1]."""
        return (block + 1) / len(self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)


def _submodule(root: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise HostError(f"No '{path}' in {where} ({type(root).__name__}): {error}.") from error


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder inside a task model (…ForMaskedLM, …ForTokenClassification), or the model itself."""
    if not hasattr(model, "config"):
        raise HostError(
            f"A host must be a transformers model or the name of one; got {type(model).__name__}, which has no config."
        )
    if model.config.model_type == "unihyperlora":
        raise HostError("A UniHyperLoRA adapter was given as the host; give the encoder that it should sit on.")
    return getattr(model, "base_model", model)


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
        return AutoModel.from_pretrained(name_or_path, trust_remote_code=False, use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise HostError(
            f"The host '{name_or_path}' cannot be loaded ({first_line(error)}). Pass "
            "base_model_name_or_path='a Hub id or a folder' or host=a_loaded_encoder; a host whose repository needs "
            "its own code, or has no safetensors file, has to be loaded by you and passed as host=."
        ) from error


def load_host_tokenizer(name_or_path: str | None, **kwargs):
    """The fast tokenizer in a host's folder or repository; its own code is never run.

    Args:
        name_or_path: a Hub id or a folder.
        **kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

    Raises:
        HostError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path or "", trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise HostError(
            f"The tokenizer of the host '{name_or_path}' cannot be loaded ({first_line(error)}). Pass tokenizer=."
        ) from error


def freeze(host: nn.Module) -> None:
    for parameter in host.parameters():
        parameter.requires_grad_(False)


def fingerprint(host: nn.Module, values_a_tensor: int = 4096) -> str:
    """SHA-256 (16 hex digits) over names, shapes and evenly spaced values of the host's weights.

    Two hosts of one name but different weights (pruned, fine-tuned further) get different fingerprints. The pooler
    does not count: no state depends on it, and where a checkpoint has none transformers draws a random one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(host.state_dict().items()):
        if name.startswith("pooler."):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // values_a_tensor)].cpu().float()
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_host(host: nn.Module, name: str | None) -> dict[str, object]:
    """What an adapter records of a host that it was trained on."""
    return {
        "name": name,
        "family": host.config.model_type,
        "hidden_size": host.config.hidden_size,
        "num_layers": host.config.num_hidden_layers,
        "fingerprint": fingerprint(host),
    }


def dtype_of(host: nn.Module) -> torch.dtype:
    return next(host.parameters()).dtype
