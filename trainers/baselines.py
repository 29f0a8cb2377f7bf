"""Baselines, trained with the same script, data order and result schema.

    probe   trains the head on a frozen host
    lora    trains PEFT's LoRA on the linear layers that the injected update uses (six per block), and the head
    full    trains every weight of the host, and the head

The head is what transformers' task model adds to the encoder. It includes the encoder's pooler if the task model reads
the pooler: a checkpoint often has no pooler, and transformers then initialises one at random.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from modeling_unihyperlora.errors import BudgetError, ConfigError, HostError, first_line
from modeling_unihyperlora.hosts import encoder_of
from modeling_unihyperlora.sites import HostMap, linear_multiply_adds, num_layers_of

BASELINES = ("probe", "lora", "full")
LORA_WEIGHTS_NAME = "adapter_model.safetensors"  # PEFT's
FULL_WEIGHTS_NAME = "model.safetensors"  # transformers'
_AUTO_CLASSES = {
    "token_classification": AutoModelForTokenClassification,
    "sequence_classification": AutoModelForSequenceClassification,
}
_PEFT_TASK_TYPES = {"token_classification": "TOKEN_CLS", "sequence_classification": "SEQ_CLS"}


def make_baseline(method: str, task_type: str, host: str, labels: list[str], lora_r: int = 8, **kwargs) -> nn.Module:
    """Make a task model on a host, in float32; only the weights that the method trains require a gradient.

    Args:
        method: one of ``BASELINES``.
        task_type: "token_classification" or "sequence_classification".
        host: Hub id or folder.
        labels: names of the ids 0 … C-1.
        lora_r: rank of LoRA; alpha is twice the rank, as usual, and LoRA itself has no dropout.
        **kwargs: ``revision``, ``cache_dir``, ``token``.

    Raises:
        HostError: the host cannot be loaded, or LoRA does not know the linear layers of its family.
        ConfigError: PEFT is not installed.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        model = _AUTO_CLASSES[task_type].from_pretrained(host, **names, dtype=torch.float32, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HostError(
            f"The host '{host}' cannot be loaded for --method {method} ({reason}). Check its name, and that it has no "
            "head for other labels."
        ) from error
    model.accepts_loss_kwargs = False  # its loss is a mean over the batch, whatever its signature says
    if method == "lora":
        return _with_lora(model, task_type, lora_r)
    if method == "probe":
        model.requires_grad_(False)
        for module in head_modules(model).values():
            module.requires_grad_(True)
    return model


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, for the modules of a task model outside the encoder's embeddings and blocks."""
    encoder = model.base_model
    outside = {name: module for name, module in model.named_children() if module is not encoder}
    if getattr(encoder, "pooler", None) is not None:
        outside[f"{model.base_model_prefix}.pooler"] = encoder.pooler
    return {name: module for name, module in outside.items() if any(True for _ in module.parameters())}


def measure_baseline(model: nn.Module, method: str, folder: str | Path | None = None) -> dict[str, int | float | None]:
    """Sizes and costs of a baseline; figures that the method does not have are left out.

    Args:
        model: a model from ``make_baseline``.
        method: one of ``BASELINES``.
        folder: where the model was saved, if it was.

    Returns:
        ``trainable_parameters``.
        ``head_bytes``: bytes of the float32 head.
        ``extra_ram_mb``: memory of the trained weights, which are held beside a shared host (for full, these are a
        whole host of its own).
        ``flops_overhead_pct`` (LoRA only): at 128 tokens, with LoRA not merged.
        ``adapter_bytes`` (LoRA and full, None without ``folder``): bytes of PEFT's or the model's weights file
        without the tensors of the head.
    """
    head_bytes = _head_bytes(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    figures: dict[str, int | float | None] = {
        "head_bytes": head_bytes,
        "trainable_parameters": sum(p.numel() for p in trained),
        "extra_ram_mb": round(sum(p.numel() * p.element_size() for p in trained) / 1e6, 3),
    }
    if method == "lora":
        figures["adapter_bytes"] = None if folder is None else _lora_bytes(Path(folder) / LORA_WEIGHTS_NAME)
        figures["flops_overhead_pct"] = round(_lora_flops_overhead_pct(model), 4)
    elif method == "full":
        file = folder and Path(folder) / FULL_WEIGHTS_NAME
        figures["adapter_bytes"] = file.stat().st_size - head_bytes if file and file.is_file() else None
    return figures


def check_baseline_budget(
    model: nn.Module, method: str, max_bytes: int | None, max_flops_overhead_pct: float | None
) -> None:
    """Raise ``BudgetError`` with the numbers if a baseline is over budget; None means no limit."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    size = trained - _head_bytes(model, method)
    overhead = _lora_flops_overhead_pct(model) if method == "lora" else 0.0
    over = {
        "bytes": size - (size if max_bytes is None else max_bytes),
        "flops_overhead_pct": overhead - (overhead if max_flops_overhead_pct is None else max_flops_overhead_pct),
    }
    if max(over.values()) > 0:
        bytes_allowed = "any number" if max_bytes is None else f"{max_bytes:,}"
        share_allowed = "any number" if max_flops_overhead_pct is None else f"{max_flops_overhead_pct:g} %"
        raise BudgetError(
            f"--method {method} is over budget: {size:,} bytes without the head ({bytes_allowed} allowed), "
            f"{overhead:.2f} % extra multiply-adds ({share_allowed} allowed). Use a smaller --lora_r or another "
            "method, or raise budget_constraints (--max_adapter_bytes, --max_flops_overhead_pct).",
            excess=over,
        )


def require_peft() -> None:
    """Raise ``ConfigError`` if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--method lora needs PEFT, which is not installed: pip install 'unihyperlora[baselines]'.")


def _with_lora(model: nn.Module, task_type: str, rank: int) -> nn.Module:
    require_peft()
    from peft import LoraConfig, get_peft_model

    try:
        sites = {id(site.linear) for site in HostMap(encoder_of(model)).sites}
    except HostError as error:
        raise HostError(
            f"--method lora does not know the linear layers of hosts of type {model.config.model_type} "
            f"({first_line(error)}). Give another host, or --method full or probe, which take any host."
        ) from error
    config = LoraConfig(
        task_type=_PEFT_TASK_TYPES[task_type],
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[name for name, module in model.named_modules() if id(module) in sites],
        modules_to_save=list(head_modules(model)),
    )
    return get_peft_model(model, config)


def _head_bytes(model: nn.Module, method: str) -> int:
    task_model = model.get_base_model() if method == "lora" else model
    head = [p for module in head_modules(task_model).values() for p in module.parameters() if p.requires_grad]
    return sum(p.numel() * p.element_size() for p in head)


def _lora_flops_overhead_pct(model: nn.Module, sequence_length: int = 128) -> float:
    """LoRA's multiply-adds per token, in per cent of those of the host's linear layers and attention."""
    factors = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    host = encoder_of(model.get_base_model())
    twice = sum(module.base_layer.weight.numel() for module in host.modules() if hasattr(module, "base_layer"))
    attention = 2 * sequence_length * host.config.hidden_size * num_layers_of(host)
    return 100 * factors / (linear_multiply_adds(host) - factors - twice + attention)


def _lora_bytes(path: Path) -> int:
    """Bytes of PEFT's weights file, without the tensors that do not belong to LoRA."""
    with safe_open(path, framework="pt") as file:
        others = [file.get_tensor(name) for name in file.keys() if ".lora_" not in name]
    return path.stat().st_size - sum(tensor.numel() * tensor.element_size() for tensor in others)
