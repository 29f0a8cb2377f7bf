"""Contents of an adapter's file, and its fit to a host; ``unihyperlora inspect`` prints them."""

from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..configuration_unihyperlora import read_config
from ..layouts import MODULE_TYPES
from ..modeling_unihyperlora import UniHyperLoraModel, make_adapter
from ..sites import is_among
from ..space import KNOTS
from ..storage import WEIGHTS_NAME, StoredTensor, adapter_file, load_adapter
from .accounting import MAX_ADAPTER_BYTES, MAX_FLOPS_OVERHEAD_PCT, flops_overhead_pct, part_of, stored_bytes
from .agreement import agreement

FAIR_AGREEMENT = 0.7  # of a task, under which a host is warned of; hosts of one or two narrow blocks have less
LOW_AGREEMENT = 0.4


def inspect_adapter(name: str | Path, revision: str = "main") -> dict[str, object]:
    """Describe an adapter's parts, tasks and origin without loading a host.

    Args:
        name: folder or Hub id of the adapter.
        revision: revision on the Hub.

    Returns:
        ``config`` (UniHyperLoraConfig), ``bytes`` (size of the weights file), ``tensors`` (rows with part, name,
        shape, bits, bytes).

    Raises:
        AdapterFileError, ConfigError: there is no adapter, or it is damaged.
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
            "bytes": stored_bytes(module),
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
    """Describe an adapter's fit to a host; aligns a stream with the host.

    Returns:
        ``describe``: one line.
        ``sites`` (module type → number of blocks that have it) and ``blocks``, for an injected update.
        ``knots`` (rows with depth, layer, R²) and ``agreement`` (trained task → share), for a stream.
        ``flops_overhead_pct``: at 128 tokens, with the active task's head.
        ``warnings``: list of sentences.

    Raises:
        AdapterFileError, ConfigError, HostError: the adapter or the host cannot be loaded.
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
                "The adapter was not trained on this host, and an injected update does not transfer to other hosts: "
                "expect the score of an untrained adapter, unless you train it here."
            )
    if model.stream is not None:
        report["knots"] = [
            {"depth": depth, "layer": knot.layer, "r2": knot.r2}
            for depth, knot in zip(KNOTS, model.stream.fit.knots, strict=True)
        ]
        trained = [name for name, task in model.config.tasks.items() if task.get("trained")]
        report["agreement"] = agreement(model, trained)
        for name, share in report["agreement"].items():
            if share is not None and share < FAIR_AGREEMENT:
                expected = "low scores" if share < LOW_AGREEMENT else "clearly less than on the source"
                report["warnings"].append(
                    f"Task '{name}' predicts only {100 * share:.0f} % of the space's text as from the source's "
                    f"states: expect {expected}."
                )
    if report["flops_overhead_pct"] > MAX_FLOPS_OVERHEAD_PCT:
        report["warnings"].append(
            f"{report['flops_overhead_pct']:.1f} % extra multiply-adds exceed the budget of "
            f"{MAX_FLOPS_OVERHEAD_PCT:g} %."
        )
    return report


def over_budget(report: dict[str, object]) -> bool:
    """Whether an adapter's file is larger than the budget."""
    return report["bytes"] > MAX_ADAPTER_BYTES
