"""What is in an adapter's file, and how it fits a host: what ``unihyperlora inspect`` prints."""

from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..configuration_unihyperlora import read_config
from ..layouts import MODULE_TYPES
from ..modeling_unihyperlora import UniHyperLoraModel, make_adapter
from ..sites import is_among
from ..space import KNOTS, LOW_FIT
from ..storage import WEIGHTS_NAME, StoredTensor, adapter_file, load_adapter
from .accounting import MAX_ADAPTER_BYTES, MAX_FLOPS_OVERHEAD_PCT, flops_overhead_pct, part_of

FAIR_FIT = 0.3  # mean R² under which a host is reported as a fair fit only


def inspect_adapter(name: str | Path, revision: str = "main") -> dict[str, object]:
    """An adapter's parts, tasks and origin; no host is loaded.

    Args:
        name: the adapter's folder or Hub id.
        revision: on the Hub.

    Returns:
        ``config`` (UniHyperLoraConfig), ``bytes`` (of the weights file), ``tensors`` (rows of part, name, shape, bits,
        bytes).

    Raises:
        AdapterFileError, ConfigError: no adapter there, or it is damaged.
    """
    weights = adapter_file(name, WEIGHTS_NAME, revision, {})
    config = read_config(adapter_file(name, CONFIG_NAME, revision, {}))
    adapter = make_adapter(config)
    load_adapter(adapter, weights)
    tensors = [
        {
            "part": part_of(tensor),
            "name": tensor,
            "shape": tuple(module.latent.shape),
            "bits": module.codec.bits,
            "bytes": sum(t.numel() * t.element_size() for t in module.encode().values()),
        }
        for tensor, module in adapter.named_modules()
        if isinstance(module, StoredTensor)
    ]
    for tensor, buffer in adapter.named_buffers():
        bits = 16 if buffer.is_floating_point() else 8 * buffer.element_size()
        tensors.append(
            {
                "part": part_of(tensor),
                "name": tensor,
                "shape": tuple(buffer.shape),
                "bits": bits,
                "bytes": buffer.numel() * bits // 8,
            }
        )
    return {"config": config, "bytes": weights.stat().st_size, "tensors": sorted(tensors, key=lambda row: row["part"])}


def inspect_on_host(name: str | Path, host: str, revision: str = "main") -> dict[str, object]:
    """How an adapter fits a host; the stream is calibrated for it.

    Returns:
        ``describe`` (one line), ``sites`` (module type → blocks that have it) and ``blocks``, or ``knots`` (rows of
        depth, layers, R²); ``flops_overhead_pct`` at 128 tokens with the active task's head,
        ``warnings``.

    Raises:
        AdapterFileError, ConfigError, HostError
    """
    model = UniHyperLoraModel.from_pretrained(name, base_model_name_or_path=host, revision=revision)
    report = {
        "describe": model.describe(),
        "flops_overhead_pct": flops_overhead_pct(model),
        "warnings": [],
    }
    if model.injection is not None:
        sites = model.injection.map.sites
        report["blocks"] = model.injection.map.num_layers
        report["sites"] = {
            role: len({site.block for site in sites if role in site.module_types}) for role in MODULE_TYPES
        }
        if not is_among(model.host, report["blocks"], model.config.source_hosts):
            report["warnings"].append(
                "The adapter was not trained on this host, and the injected update does not carry over to others: "
                "expect what an untrained adapter would score, unless it is trained here."
            )
    if model.stream is not None:
        report["knots"] = [
            {"depth": depth, "layer": knot.layer, "r2": knot.r2}
            for depth, knot in zip(KNOTS, model.stream.fit.knots, strict=True)
        ]
        fit = sum(model.stream.fit.r2) / len(KNOTS)
        if fit < LOW_FIT:
            report["warnings"].append(
                f"Mean R² {fit:.2f}: the host hardly fits the canonical space, expect low scores. Is it of another "
                "language, or trained for something else than text?"
            )
        elif fit < FAIR_FIT:
            report["warnings"].append(
                f"Mean R² {fit:.2f}: a fair fit, as that of very small hosts; expect clearly less than on the source."
            )
    if report["flops_overhead_pct"] > MAX_FLOPS_OVERHEAD_PCT:
        report["warnings"].append(
            f"{report['flops_overhead_pct']:.1f} % extra multiply-adds, over the budget of {MAX_FLOPS_OVERHEAD_PCT:g}."
        )
    return report


def over_budget(report: dict[str, object]) -> bool:
    """Whether an adapter's file is larger than the budget."""
    return report["bytes"] > MAX_ADAPTER_BYTES
