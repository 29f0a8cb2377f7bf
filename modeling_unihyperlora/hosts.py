"""The host: a frozen model of transformers. Loading it, calling it, telling it from others, leaving it as it was."""

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel
from transformers.integrations import deepspeed

from .errors import HostError, MergeError, first_line

logger = logging.getLogger(__name__)

_NO_LENGTH = 10**9  # a tokenizer that knows no length states 1e30
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # tables of learned positions


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
    if getattr(model.config, "is_encoder_decoder", False) or hasattr(getattr(model, "encoder", None), "block"):
        model = model.get_encoder()  # of T5 its encoder alone
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
        with _whole(), _without_report():
            host, found = AutoModel.from_pretrained(
                transformers_folder(name_or_path),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise HostError(
            f"The host '{name_or_path}' cannot be loaded ({first_line(error)}). Pass "
            "base_model_name_or_path='a Hub id or a folder' or host=a_loaded_encoder; a host whose repository needs "
            "its own code, or has no safetensors file, has to be loaded by you and passed as host=."
        ) from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))  # no state depends on it
    if missing:
        logger.warning(
            "The host '%s' lacks %d of its weights (%s …), which are random now. Check the checkpoint.",
            name_or_path,
            len(missing),
            missing[0],
        )
    return host


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Within it transformers does not print which weights a checkpoint has too many of, or lacks."""
    reporter = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    reporter.addFilter(keep)
    try:
        yield
    finally:
        reporter.removeFilter(keep)


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


def check_states(
    host: nn.Module, hidden_states: tuple[torch.Tensor, ...] | None, input_ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The states that a host returned for ids (B, T), which have to be (B, T, d) each: all that the stream needs.

    Raises:
        HostError: they are none, or of other shapes.
    """
    shape = (*input_ids.shape, host.config.hidden_size)
    found = {tuple(state.shape) for state in hidden_states or ()}
    if found != {shape}:
        raise HostError(
            f"{type(host).__name__} returns hidden states of shapes {sorted(found) or 'none'}; the stream needs "
            f"{shape} after every block. If the host was changed, correct its config; else use another host."
        )
    return hidden_states


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


def describe_host(host: nn.Module, name: str | None, num_layers: int) -> dict[str, object]:
    """What an adapter records of a host of so many blocks that it was trained on."""
    return {
        "name": name,
        "family": host.config.model_type,
        "hidden_size": host.config.hidden_size,
        "num_layers": num_layers,
        "fingerprint": fingerprint(host),
    }


def dtype_of(host: nn.Module) -> torch.dtype:
    return next(host.parameters()).dtype


class Hold:
    """Which models have their adapters on a host, and what of it they changed.

    Attributes:
        models: those whose adapters are on the host.
        merged: whether the update of one of them is in the host's weights.
    """

    def __init__(self, host: nn.Module):
        self.models: weakref.WeakSet = weakref.WeakSet()
        self.merged = False
        self.trainable = [parameter for parameter in host.parameters() if parameter.requires_grad]
        self.training = [module for module in host.modules() if module.training]

    def __deepcopy__(self, memo: dict) -> "Hold":
        """A copied model holds its copied host; on the copy of a host alone nobody has an adapter."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.models = weakref.WeakSet(memo[id(model)] for model in self.models if id(model) in memo)
        twin.trainable = copy.deepcopy(self.trainable, memo)
        twin.training = copy.deepcopy(self.training, memo)
        return twin

    def __getstate__(self) -> dict:
        return vars(self) | {"models": None}  # weak references cannot be pickled

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state | {"models": weakref.WeakSet()})

    @classmethod
    def on(cls, host: nn.Module) -> "Hold | None":
        return vars(host).get("_unihyperlora_hold")

    @classmethod
    def check(cls, host: nn.Module) -> None:
        """Raise ``HostError`` if the host's weights have another adapter's update in them."""
        if (hold := cls.on(host)) is not None and hold.merged:
            raise HostError(
                "Another adapter's update is merged into this host, so its weights are not its own. Call unmerge() "
                "or detach() of that model first, or load the host afresh."
            )

    @classmethod
    def take(cls, host: nn.Module, model: nn.Module) -> None:
        """Freeze the host for a model's adapter."""
        hold = cls.on(host)
        if hold is None:
            hold = host._unihyperlora_hold = cls(host)
        hold.models.add(model)
        for parameter in host.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def release(cls, host: nn.Module, model: nn.Module) -> None:
        """The host as it was given, once no other adapter is on it."""
        hold = cls.on(host)
        if hold is None or model not in hold.models:
            return
        hold.models.discard(model)
        if not hold.models:
            for parameter in hold.trainable:
                parameter.requires_grad_(True)
            for module in hold.training:
                module.training = True
            del host._unihyperlora_hold

    @classmethod
    def check_alone(cls, host: nn.Module) -> None:
        """Raise ``MergeError`` if other adapters are on the host, whose outputs a merged update would change."""
        if (hold := cls.on(host)) is not None and len(hold.models) > 1:
            raise MergeError(
                f"{len(hold.models)} adapters are on this host, and a merged update would change what the others "
                "compute. Call detach() of the others first, or merge into a host of its own."
            )
