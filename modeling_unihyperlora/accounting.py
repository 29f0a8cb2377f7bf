"""What an adapter costs: bytes of the file, multiply-adds a token, memory held, parameters trained."""

from pathlib import Path

from .errors import BudgetError
from .injection import Injection
from .storage import WEIGHTS_NAME, bytes_of_parts, file_bytes
from .stream import Stream

MAX_ADAPTER_BYTES = 1_000_000
MAX_FLOPS_OVERHEAD_PCT = 10.0


def host_multiply_adds(path: Injection | Stream, sequence_length: int) -> int:
    """Multiply-adds a token of the host's own blocks: its linear layers, QKᵀ and the weighted sum of V."""
    return path.host_multiply_adds(sequence_length)


def added_multiply_adds(path: Injection | Stream, labels: int) -> int:
    """Multiply-adds a token that the adapter and its head add."""
    return path.added_multiply_adds(labels)


def flops_overhead_pct(path: Injection | Stream, labels: int, sequence_length: int = 128) -> float:
    """Added multiply-adds a token over the host's own, in per cent, at a given sentence length."""
    return 100 * added_multiply_adds(path, labels) / host_multiply_adds(path, sequence_length)


def merged_flops_overhead_pct(model, sequence_length: int = 128) -> float:
    """``flops_overhead_pct`` with the injected update on top of a stream merged, where the host can take it in.

    An update that is the same for every token can be merged at any time and then costs nothing.
    """
    path, labels = model.path, len(model.labels)
    added = added_multiply_adds(path, labels)
    if model.config.pathway == "both" and model.injection is not None and model.injection.map.mergeable():
        added -= model.injection.update_multiply_adds()
    return 100 * added / host_multiply_adds(path, sequence_length)


def held_megabytes(model) -> float:
    """Megabytes of tensors that the adapter keeps beside its host: parameters, buffers, what is made for this host."""
    tensors = [
        *model.adapter.parameters(),
        *model.adapter.buffers(),
        *model.path.held_tensors(model.config.active_task),
    ]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def measure(model, folder: str | Path | None = None) -> dict[str, object]:
    """Figures of one adapter on its host.

    Args:
        model: a UniHyperLoRA model.
        folder: where it was saved; ``adapter_bytes`` is then the size of its weights file.

    Returns:
        ``adapter_bytes`` (None without ``folder``), ``head_bytes`` and ``delta_bytes`` of the active task
        (None where δθ is never trained),
        ``extra_ram_mb``, ``flops_overhead_pct`` at 128 tokens as the model is, ``merged_flops_overhead_pct`` with the
        injected update on top of a stream merged (None for other adapters), ``trainable_parameters``, ``parts``
        (bytes by part, all tasks), ``budget_ok`` (of what ``check_budget`` counts).
    """
    own = model.adapter.tasks[model.config.active_task]
    size = None if folder is None else (Path(folder) / WEIGHTS_NAME).stat().st_size
    parts = bytes_of_parts(model.adapter)
    overhead = merged_flops_overhead_pct(model)
    stored = size if size is not None else file_bytes(model.adapter)
    return {
        "adapter_bytes": size,
        "head_bytes": _file_bytes(own.head_weight, own.head_bias),
        "delta_bytes": None if model.config.projector == "host" else _file_bytes(*own.deltas()),
        "extra_ram_mb": round(held_megabytes(model), 3),
        "flops_overhead_pct": round(flops_overhead_pct(model.path, len(model.labels)), 4),
        "merged_flops_overhead_pct": round(overhead, 4) if model.config.pathway == "both" else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parts": parts,
        "budget_ok": stored <= MAX_ADAPTER_BYTES and overhead <= MAX_FLOPS_OVERHEAD_PCT,
    }


def check_budget(
    model, max_bytes: int = MAX_ADAPTER_BYTES, max_flops_overhead_pct: float = MAX_FLOPS_OVERHEAD_PCT
) -> None:
    """Raise ``BudgetError`` with the numbers if the adapter's file or its multiply-adds would be over budget.

    Of an injected update on top of a stream it counts what it costs merged; see ``merged_flops_overhead_pct``.
    """
    size = file_bytes(model.adapter)
    overhead = merged_flops_overhead_pct(model)
    if size > max_bytes or overhead > max_flops_overhead_pct:
        smaller = "fewer atoms, a smaller router_top_k or a narrower canonical space (anchor_dim)"
        if model.config.pathway != "inject":
            smaller = "a narrower stream (stream_width, stream_hidden) or fewer coordinates (stream_dim)"
        elif model.config.projector == "host":
            smaller = "a smaller rank (--lora_r) or router_top_k"
        raise BudgetError(
            f"Over budget: {size:,} bytes of {max_bytes:,} allowed, {overhead:.2f} % extra multiply-adds of "
            f"{max_flops_overhead_pct:g} % allowed. Use {smaller}, or raise the budget (--max_adapter_bytes, "
            "--max_flops_overhead_pct).",
            excess={"bytes": size - max_bytes, "flops_overhead_pct": overhead - max_flops_overhead_pct},
        )


def _file_bytes(*stored) -> int:
    return sum(t.numel() * t.element_size() for module in stored for t in module.encode().values())
