"""What an adapter costs: bytes of the file, multiply-adds a token, memory held, parameters trained."""

from pathlib import Path

from .adapter import KNOTS
from .errors import BudgetError
from .injection import Injection
from .storage import WEIGHTS_NAME, bytes_of_parts, file_bytes

MAX_ADAPTER_BYTES = 1_000_000
MAX_FLOPS_OVERHEAD_PCT = 10.0


def host_multiply_adds(injection: Injection, sequence_length: int) -> int:
    """Multiply-adds a token of the host's blocks: its linear layers, QKᵀ and the weighted sum of V."""
    linear = sum(site.linear.in_features * site.linear.out_features for site in injection.map.sites)
    attention = sum(
        2 * sequence_length * site.linear.out_features for site in injection.map.sites if site.module_type == "query"
    )
    return linear + attention


def added_multiply_adds(injection: Injection, labels: int) -> int:
    """Multiply-adds a token that the adapter and its head add; nothing but the head when merged.

    A block scores M atoms once; each layer then reads and writes k atoms (all M with the static router), and layers
    that share an input share the reading. The squares of the norms and the division by them count as well.
    """
    config = injection.adapter.config
    total = (labels + 2) * len(KNOTS) * injection.map.hidden_size
    if injection.merged:
        return total
    used = config.atoms if config.router == "static" else config.router_top_k
    if config.router == "token":
        total += injection.map.num_layers * (config.atoms + 1) * injection.map.hidden_size
    for site, (read_side, _, write_side, _) in injection.plans.items():
        width = {"input": site.linear.in_features, "output": site.linear.out_features}
        shares_reading = read_side == "input" and site.module_type in ("key", "value")
        total += used * (width[write_side] + (0 if shares_reading else width[read_side]))
    return total


def flops_overhead_pct(injection: Injection, labels: int, sequence_length: int = 128) -> float:
    """Added multiply-adds a token over the host's own, in per cent, at a given sentence length."""
    return 100 * added_multiply_adds(injection, labels) / host_multiply_adds(injection, sequence_length)


def held_megabytes(model) -> float:
    """Megabytes of tensors that the adapter keeps beside its host: parameters, buffers and projected atoms."""
    tensors = [*model.adapter.parameters(), *model.adapter.buffers()]
    atoms = model.injection.project(model.config.active_task)
    tensors += [*atoms.read.values(), *atoms.write.values(), *atoms.router_rows.values(), atoms.coefficients]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def measure(model, folder: str | Path | None = None) -> dict[str, object]:
    """Figures of one adapter on its host.

    Args:
        model: a UniHyperLoRA model.
        folder: where it was saved; ``adapter_bytes`` is then the size of its weights file.

    Returns:
        ``adapter_bytes`` (None without ``folder``), ``head_bytes`` and ``delta_bytes`` of the active task,
        ``extra_ram_mb``, ``flops_overhead_pct`` at 128 tokens, ``trainable_parameters``, ``parts`` (bytes by part,
        all tasks), ``budget_ok``.
    """
    own = model.adapter.tasks[model.config.active_task]
    size = None if folder is None else (Path(folder) / WEIGHTS_NAME).stat().st_size
    parts = bytes_of_parts(model.adapter)
    overhead = flops_overhead_pct(model.injection, len(model.labels))
    stored = size if size is not None else file_bytes(model.adapter)
    return {
        "adapter_bytes": size,
        "head_bytes": _file_bytes(own.head_weight, own.head_bias),
        "delta_bytes": _file_bytes(own.delta),
        "extra_ram_mb": round(held_megabytes(model), 3),
        "flops_overhead_pct": round(overhead, 4),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parts": parts,
        "budget_ok": stored <= MAX_ADAPTER_BYTES and overhead <= MAX_FLOPS_OVERHEAD_PCT,
    }


def check_budget(
    model, max_bytes: int = MAX_ADAPTER_BYTES, max_flops_overhead_pct: float = MAX_FLOPS_OVERHEAD_PCT
) -> None:
    """Raise ``BudgetError`` with the numbers if the adapter's file or its multiply-adds would be over budget."""
    size = file_bytes(model.adapter)
    overhead = flops_overhead_pct(model.injection, len(model.labels))
    if size > max_bytes or overhead > max_flops_overhead_pct:
        raise BudgetError(
            f"Over budget: {size:,} bytes of {max_bytes:,} allowed, {overhead:.2f} % extra multiply-adds of "
            f"{max_flops_overhead_pct:g} % allowed. Use fewer atoms, a narrower canonical space (anchor_dim) or a "
            "smaller router_top_k, or raise the budget."
        )


def _file_bytes(*stored) -> int:
    return sum(t.numel() * t.element_size() for module in stored for t in module.encode().values())
