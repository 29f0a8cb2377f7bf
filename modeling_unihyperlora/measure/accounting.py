"""Costs of an adapter: file size, multiply-adds per token, memory, trained parameters."""

from pathlib import Path

import torch

from ..errors import BudgetError
from ..hosts import NoHost
from ..sites import linear_multiply_adds
from ..space import KNOTS
from ..storage import WEIGHTS_NAME, StoredTensor, adapter_tensors, file_bytes

MAX_ADAPTER_BYTES = 1_000_000
MAX_FLOPS_OVERHEAD_PCT = 10.0
# The parts of an adapter, as named in learning rates and in tables of bytes.
PARTS = ("space", "reader", "dictionary", "projector", "mixer", "router", "delta", "head")


def part_of(name: str) -> str:
    """Part of the adapter that a tensor belongs to; ``name`` is its name in the file or in the state dict."""
    first, *rest = name.split(".")
    if first == "tasks":
        parts = {"delta": "delta", "head_weight": "head", "head_bias": "head", "reader": "reader"}
        return parts.get(rest[1], "router")
    return "dictionary" if first.startswith("atoms_") else first.split("_")[0]


def bytes_of_parts(adapter: torch.nn.Module) -> dict[str, int]:
    """Part → bytes of its tensors in the file; "mean_gate" of a task counts as router."""
    parts: dict[str, int] = {}
    for name, tensor in adapter_tensors(adapter, StoredTensor.layout).items():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + tensor.nbytes
    return parts


def host_multiply_adds(model, sequence_length: int) -> int:
    """Multiply-adds of the host per token: linear layers without the pooler, QKᵀ, and the weighted sum of V."""
    if model.injection is None:
        blocks = model.bound_stream.words.num_layers
        return linear_multiply_adds(model.host) + 2 * sequence_length * model.host.config.hidden_size * blocks
    sites = model.injection.map.sites
    linear = sum(
        site.widths["input"] * site.widths["output"] * len(site.module_types) // getattr(site.linear, "groups", 1)
        for site in sites
    )
    queries = (site.widths["output"] for site in sites if "query" in site.module_types)
    return linear + sum(2 * sequence_length * width for width in queries)


def added_multiply_adds(model) -> int:
    """Multiply-adds that the adapter adds per token, including the active task's reader and head.

    A stream's cost per word is counted for every token, as if each token were a word. For an injected update, the
    squares of its norms count too.
    """
    labels = len(model.labels) if model.config.active_task else 0
    if model.injection is None:
        return _map_multiply_adds(model) + (_task_multiply_adds(model, labels) if labels else 0)
    width = model.injection.map.hidden_size
    return len(KNOTS) * ((labels + 1) * width + labels) + update_multiply_adds(model.injection)


def _map_multiply_adds(model) -> int:
    """Multiply-adds of the host's map into the space, which all tasks share."""
    fit, width = model.bound_stream.fit, model.host.config.hidden_size
    dim = model.config.space["dim"]
    linear = len(KNOTS) * dim * width
    if (landmarks := fit.landmarks) is None:
        return linear
    query = len(landmarks.offset) * width * len(fit.layers)
    return linear + query + len(landmarks.at) * (landmarks.at.shape[1] + len(KNOTS) * dim)


def _task_multiply_adds(model, labels: int) -> int:
    """Multiply-adds of the active task: the change of the map by δθ, the reader and the head."""
    shape, dim = model.config.tasks[model.config.active_task]["reader"], model.config.space["dim"]
    inward = len(KNOTS) * dim * shape["width"]
    recurrent = 2 * 4 * shape["hidden"] * (shape["width"] + shape["hidden"])
    return len(KNOTS) * dim * dim + inward + recurrent + labels * 2 * shape["hidden"]


def update_multiply_adds(injection) -> int:
    """Multiply-adds of an injected update without the head; 0 if it is merged.

    A block scores M atoms once. Each layer then reads and writes k atoms (all M with the static router); query, key
    and value share the reading.
    """
    config, total = injection.adapter.config, 0
    if injection.merged:
        return 0
    used = config.atoms if injection.static else config.router_top_k
    if not injection.static:
        total += injection.map.num_layers * (config.atoms + 1) * injection.map.hidden_size
    for site, (read_side, _, write_side, _) in injection.plans.items():
        shares_reading = read_side == "input" and site.module_types in (("key",), ("value",))
        writes = site.widths[write_side] * len(site.module_types)
        total += used * (writes + (0 if shares_reading else site.widths[read_side]))
    return total


def flops_overhead_pct(model, sequence_length: int = 128) -> float:
    """Added multiply-adds per token, in per cent of the host's, at a given sentence length."""
    return 100 * added_multiply_adds(model) / host_multiply_adds(model, sequence_length)


def held_tensors(model) -> list[torch.Tensor]:
    """Tensors made for this host and the active task: the map, or the atoms in the host's coordinates."""
    task = model.config.active_task
    if model.injection is not None:
        atoms = model.injection.project(task)
        return [*atoms.read.values(), *atoms.write.values(), *atoms.router_rows.values(), atoms.coefficients]
    stream = model.bound_stream
    by_knot = [tensor for part in stream.fit.parts for tensor in part if isinstance(tensor, torch.Tensor)]
    amended, reader, *head, _ = model.adapter.values(task)
    directions = [tensor for direction in (*reader.directions, *(reader.packed or [])) for tensor in direction]
    return [
        *by_knot,
        stream.words.rules,
        *([] if amended is None else [amended]),
        reader.inward,
        reader.inward_bias,
        *{id(tensor): tensor for tensor in directions}.values(),
        *head,
    ]


def held_megabytes(model) -> float:
    """Megabytes of tensors that the adapter adds to its host: parameters, buffers and ``held_tensors``."""
    tensors = [*model.adapter.parameters(), *model.adapter.buffers(), *held_tensors(model)]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def measure(model, folder: str | Path | None = None) -> dict[str, object]:
    """Sizes and costs of an adapter on its host.

    Args:
        model: a UniHyperLoRA model.
        folder: folder where the model was saved, for the size of its weights file.

    Returns:
        ``adapter_bytes``: size of the weights file (None without ``folder``).
        ``head_bytes``, ``reader_bytes``, ``delta_bytes``: of the active task (None without a reader, or if δθ is never
        trained).
        ``extra_ram_mb``, ``flops_overhead_pct`` (at 128 tokens): None without a host in memory.
        ``trainable_parameters``, ``budget_ok``.
        ``parts``: part → bytes, over all tasks.
        ``space``: name, version and digest of a stream's space (else None).
    """
    own = model.adapter.tasks[model.config.active_task]
    size = None if folder is None else (Path(folder) / WEIGHTS_NAME).stat().st_size
    has_host, stream = not isinstance(model.host, NoHost), model.injection is None
    overhead = flops_overhead_pct(model) if has_host else None
    stored = size if size is not None else file_bytes(model.adapter)
    space = model.adapter.space if stream else None
    return {
        "adapter_bytes": size,
        "head_bytes": stored_bytes(own.head_weight, own.head_bias),
        "reader_bytes": stored_bytes(*_stored_in(own.reader)) if stream else None,
        "delta_bytes": None if model.config.projector == "host" else stored_bytes(own.delta),
        "extra_ram_mb": round(held_megabytes(model), 3) if has_host else None,
        "flops_overhead_pct": round(overhead, 4) if has_host else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parts": bytes_of_parts(model.adapter),
        "budget_ok": stored <= MAX_ADAPTER_BYTES and (overhead or 0) <= MAX_FLOPS_OVERHEAD_PCT,
        "space": None if space is None else f"{space.name} {space.version} {space.digest}",
    }


def check_budget(
    model, max_bytes: int = MAX_ADAPTER_BYTES, max_flops_overhead_pct: float = MAX_FLOPS_OVERHEAD_PCT
) -> None:
    """Raise ``BudgetError`` with the numbers if the adapter's file or its multiply-adds exceed the budget.

    Without a host in memory the multiply-adds are not checked, since the budget is relative to the host's.
    """
    size = file_bytes(model.adapter)
    overhead = 0.0 if isinstance(model.host, NoHost) else flops_overhead_pct(model)
    if size > max_bytes or overhead > max_flops_overhead_pct:
        smaller = "a smaller reader (--reader), or a space with fewer coordinates or anchors (--space)"
        if model.config.projector == "host":
            smaller = "a smaller rank (--lora_r) or router_top_k"
        elif model.config.pathway == "inject":
            smaller = "fewer atoms, a smaller router_top_k or a narrower canonical space (anchor_dim)"
        raise BudgetError(
            f"Over budget: {size:,} bytes ({max_bytes:,} allowed), {overhead:.2f} % extra multiply-adds "
            f"({max_flops_overhead_pct:g} % allowed). Use {smaller}, or raise the budget (--max_adapter_bytes, "
            "--max_flops_overhead_pct).",
            excess={"bytes": size - max_bytes, "flops_overhead_pct": overhead - max_flops_overhead_pct},
        )


def _stored_in(module: torch.nn.Module) -> list[StoredTensor]:
    return [part for part in module.modules() if isinstance(part, StoredTensor)]


def stored_bytes(*stored: StoredTensor) -> int:
    """Bytes of stored tensors in the file."""
    return sum(tensor.nbytes for one in stored for tensor in one.layout().values())
