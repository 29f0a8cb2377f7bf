"""The host, a frozen model of transformers: loading it, calling it, identifying it, restoring it."""

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
from transformers import AutoModel, PreTrainedConfig
from transformers.integrations import deepspeed

from .errors import HostError, MergeError, first_line

logger = logging.getLogger(__name__)

_NO_LENGTH = 10**9  # a tokenizer without a maximum length states 1e30
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # learned position tables


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder inside a task model (…ForMaskedLM, …ForTokenClassification), or the model itself.

    An encoder-decoder model gives its encoder, a SentenceTransformer its transformers model.

    Raises:
        HostError: the model is not a transformers model, or is a UniHyperLoRA adapter.
    """
    model = getattr(model, "transformers_model", None) or model
    if not hasattr(model, "config"):
        raise HostError(
            f"A host must be a transformers model or its name; got {type(model).__name__}, which has no config."
        )
    if model.config.model_type == "unihyperlora":
        raise HostError("The host is a UniHyperLoRA adapter; give the encoder that the adapter should use.")
    model = getattr(model, "base_model", model)
    if getattr(model.config, "is_encoder_decoder", False) or hasattr(getattr(model, "encoder", None), "block"):
        model = model.get_encoder()  # also for a T5 encoder alone
    return model


def load_host(name_or_path: str | None, **kwargs) -> nn.Module:
    """Load a host with ``AutoModel`` from safetensors; never runs code from the host's repository.

    Args:
        name_or_path: a Hub id or a folder.
        **kwargs: ``revision``, ``dtype``, ``cache_dir``, ``token``, ``local_files_only``.

    Returns:
        The host; of an encoder-decoder model, its encoder.

    Raises:
        HostError: no host is named, or the host cannot be loaded.
    """
    if not name_or_path:
        raise HostError(
            "The adapter does not name a host. Pass base_model_name_or_path='a Hub id or a folder' (on the command "
            "line --host) or host=a_loaded_encoder."
        )
    try:
        with _unsharded(), _without_report():
            host, found = AutoModel.from_pretrained(
                transformers_folder(name_or_path),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        raise HostError(
            f"The host '{name_or_path}' cannot be loaded ({first_line(error)}). Give the Hub id "
            "or the folder of an encoder or a decoder. If its repository needs its own code or has no safetensors "
            "file, load the host yourself and pass it as host=."
        ) from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))  # states do not need it
    if missing:
        logger.warning(
            "The checkpoint of the host '%s' lacks %d weights (%s …), which are now random. Check the checkpoint.",
            name_or_path,
            len(missing),
            missing[0],
        )
    return encoder_of(host)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Context in which transformers does not print its report of missing and unexpected weights."""
    reporter = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    reporter.addFilter(keep)
    try:
        yield
    finally:
        reporter.removeFilter(keep)


@contextlib.contextmanager
def _unsharded() -> Iterator[None]:
    """Make transformers load whole models in every process, also under DeepSpeed's ZeRO-3.

    The whole weights are needed before training, to identify the host and to compute its states. Training then shards
    them.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


class NoHost(nn.Module):
    """Stands in for a host: the model gets canonical states, which a host has computed before.

    Args:
        name_or_path: default host for loading adapters that are made with this object.
    """

    main_input_name = "canonical_states"
    device = torch.device("cpu")

    def __init__(self, name_or_path: str | None = None):
        super().__init__()
        self.config = PreTrainedConfig(name_or_path=name_or_path or "")

    def forward(self, canonical_states: torch.Tensor):
        raise HostError("This model has no host in memory, so it cannot read text: give canonical_states.")


def transformers_folder(name_or_path: str) -> str:
    """Folder of the transformers model inside a sentence-transformers folder; returns any other name unchanged."""
    try:
        modules = json.loads((Path(name_or_path) / "modules.json").read_text(encoding="utf-8"))
        inner = Path(name_or_path) / modules[0]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return str(name_or_path)
    return str(inner) if (inner / "config.json").is_file() else str(name_or_path)


def window_of(host: nn.Module, tokenizer=None) -> int | None:
    """Maximum number of sub-tokens, including special tokens, that a host can read at once; None without a limit.

    The limit is the smallest of three values: the tokenizer's maximum; the configuration's (for rotary embeddings, the
    context of pretraining); and the number of learned positions. Some families do not use the first rows of the
    position table: RoBERTa's 514 rows are 512 positions. T5, XLNet and hosts with ALiBi have relative positions, so
    only the tokenizer limits them.

    Args:
        host: an encoder or decoder, or a task model on one.
        tokenizer: the host's tokenizer; None ignores its limit.
    """
    stated = getattr(tokenizer, "model_max_length", None)
    limits = [] if stated is None or stated >= _NO_LENGTH else [int(stated)]
    config = host.config.get_text_config() if hasattr(host.config, "get_text_config") else host.config
    for name in ("max_position_embeddings", "max_seq_len"):  # XLNet has -1
        most = getattr(config, name, None)
        if isinstance(most, int) and most > 0 and not getattr(config, "alibi", False):
            limits.append(most)
    for name, module in host.named_modules():
        table = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (table in _POSITIONS or table.endswith("position_embeddings")):
            skipped = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - skipped)
    return min(limits, default=None)


@functools.cache  # reading a signature takes as long as a small layer
def _arguments(host: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(host.forward).parameters)


def call_host(host: nn.Module, attention_mask: torch.Tensor | None, **inputs):
    """Call the host without arguments that it does not accept (FNet has no mask), and without a key-value cache."""
    known = (_arguments.__wrapped__ if torch.compiler.is_compiling() else _arguments)(type(host))
    if attention_mask is not None and "attention_mask" in known:
        inputs["attention_mask"] = attention_mask
    if "use_cache" in known:
        inputs["use_cache"] = False
    return host(return_dict=True, **inputs)


def explain_ids(host: nn.Module, input_ids: torch.Tensor, error: Exception) -> None:
    """Raise ``HostError`` if a host failed on ids (B, T) because they are too many or have no embedding."""
    window, rows = window_of(host), host.get_input_embeddings().weight.shape[0]
    if window is not None and input_ids.shape[1] > window:
        raise HostError(
            f"A text has {input_ids.shape[1]} tokens, but the host '{host.config.name_or_path}' reads at most "
            f"{window}. Give the tokenizer truncation=True, or cut the text. A pipeline with stride=16 reads windows."
        ) from error
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= rows:
        raise HostError(
            f"input_ids go from {lowest} to {highest}, but the host '{host.config.name_or_path}' embeds 0 to "
            f"{rows - 1}: the ids are from another tokenizer. Use the host's tokenizer."
        ) from error


def check_states(
    host: nn.Module, hidden_states: tuple[torch.Tensor, ...] | None, input_ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Check that a host returned states (B, T, d) for ids (B, T), as the stream needs; returns the states.

    Raises:
        HostError: the host returned no states, or states of another shape.
    """
    shape = (*input_ids.shape, host.config.hidden_size)
    found = {tuple(state.shape) for state in hidden_states or ()}
    if found != {shape}:
        raise HostError(
            f"{type(host).__name__} returns hidden states of shapes {sorted(found) or 'none'}, but the stream needs "
            f"{shape} after every block. If you changed the host, correct its config; otherwise use another host."
        )
    return hidden_states


def fingerprint(host: nn.Module, values_a_tensor: int = 4096) -> str:
    """SHA-256 (16 hex digits) over names, shapes and evenly spaced values of the host's weights.

    Hosts with the same name but different weights (pruned or fine-tuned) have different fingerprints. The pooler is
    left out: no state depends on it, and transformers initialises a missing pooler at random.
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
    """Tensors of the state dict; packed tensors of quantised layers are unpacked."""
    state = {}
    for name, value in host.state_dict().items():
        for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, torch.Tensor):
                state[f"{name}.{number}" if isinstance(value, tuple) else name] = part
    return state


def describe_host(host: nn.Module, name: str | None, num_layers: int) -> dict[str, object]:
    """Description of a host that an adapter records when it is trained on it."""
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
    """The adapters on a host, and the host's original state, to restore it later.

    Attributes:
        models: models whose adapters are on the host.
        merged: whether the update of one of them is merged into the host's weights.
        trainable: parameters that required a gradient originally.
        training: modules that were in training mode originally.
    """

    def __init__(self, host: nn.Module):
        self.models: weakref.WeakSet = weakref.WeakSet()
        self.merged = False
        self.trainable = [parameter for parameter in host.parameters() if parameter.requires_grad]
        self.training = [module for module in host.modules() if module.training]

    def __deepcopy__(self, memo: dict) -> "Hold":
        """A copied model holds its copied host; a host that is copied alone has no adapters."""
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
        """Raise ``HostError`` if another adapter's update is merged into the host's weights."""
        if (hold := cls.on(host)) is not None and hold.merged:
            raise HostError(
                "Another adapter's update is merged into this host, so its weights are changed. Call unmerge() or "
                "detach() of that model first, or load the host again."
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
        """Remove a model's adapter; restores the host's original state once no adapter is left."""
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
        """Raise ``MergeError`` if other adapters are on the host: a merged update would change their outputs."""
        if (hold := cls.on(host)) is not None and len(hold.models) > 1:
            raise MergeError(
                f"{len(hold.models)} adapters are on this host, and a merged update would change the output of the "
                "others. Call detach() of the others first, or load a separate host for the merge."
            )
