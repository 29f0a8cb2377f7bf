"""``unihyperlora inspect ADAPTER [--host HOST]``: contents of an adapter, and its fit to a host."""

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from modeling_unihyperlora.measure.inspection import inspect_adapter, inspect_on_host, over_budget

from . import new_parser


def main(command_line: list[str] | None = None) -> None:
    parser = new_parser("inspect", "ADAPTER", "Show the contents of an adapter, and its fit to a host.")
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("--host", help="folder or Hub id of a host to put the adapter on")
    parser.add_argument("--revision", default="main", help="revision of the adapter on the Hub")
    args = parser.parse_args(command_line)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    report = inspect_adapter(args.adapter, args.revision)
    show_adapter(console, report)
    if args.host:
        show_host(console, inspect_on_host(args.adapter, args.host, args.revision))
    else:
        own = report["config"].base_model_name_or_path
        console.print(f"To see its fit to a host, add --host A_HOST (its own host was {own}).", highlight=False)


def show_adapter(console: Console, report: dict) -> None:
    config = report["config"]
    if config.pathway == "stream":
        kind = f"space {config.space['name']} {config.space['version']}, {config.space['dim']} coordinates per knot"
    else:
        kind = f"projector {config.projector}, router {config.router}, {config.router_top_k} of {config.atoms} atoms"
    console.print(f"pathway {config.pathway}, {kind}, format {config.format_version}", highlight=False)
    parts = Table("part", "tensor", "shape", "bits", "bytes", title="In the file")
    parts.columns[1].overflow = "fold"
    for column in parts.columns[3:]:
        column.justify = "right"
    for row in report["tensors"]:
        shape = " × ".join(map(str, row["shape"]))
        parts.add_row(row["part"], row["name"], shape, str(row["bits"]), f"{row['bytes']:,}")
    values = sum(row["bytes"] for row in report["tensors"])
    parts.add_section()
    parts.add_row("header", "", "", "", f"{report['bytes'] - values:,}")
    parts.add_row("file", "over the budget of 1 MB" if over_budget(report) else "", "", "", f"{report['bytes']:,}")
    console.print(parts)
    tasks = Table("task", "type", "trained", "labels", title="Tasks")
    for name, task in config.tasks.items():
        active = " (active)" if name == config.active_task else ""
        labels = ", ".join(task["labels"])
        tasks.add_row(name + active, task["type"], "yes" if task.get("trained") else "no", labels)
    console.print(tasks)
    hosts = Table("host", "family", "blocks", "width", "fingerprint", title="Trained on")
    for host in config.source_hosts:
        hosts.add_row(*(str(host.get(key)) for key in ("name", "family", "num_layers", "hidden_size", "fingerprint")))
    console.print(hosts)


def show_host(console: Console, report: dict) -> None:
    console.print(report["describe"], highlight=False)
    if "sites" in report:
        table = Table("module type", "sites found", title="On this host")
        for role, found in report["sites"].items():
            table.add_row(role, f"{found}/{report['blocks']}")
        table.add_section()
        table.add_row("all", f"{sum(report['sites'].values())}/{6 * report['blocks']}")
        console.print(table)
    if "knots" in report:
        table = Table("knot", "layer", "R²", title="Calibration on this host")
        for knot in report["knots"]:
            table.add_row(f"{knot['depth']:g}", str(knot["layer"]), f"{knot['r2']:.3f}")
        console.print(table)
    for name, share in report.get("agreement", {}).items():
        said = "no word is tagged" if share is None else f"{100 * share:.1f} % as from the source's states"
        console.print(f"task {name} on the space's text, without a label: {said}", highlight=False)
    console.print(f"extra multiply-adds per token: {report['flops_overhead_pct']:.2f} %", highlight=False)
    for warning in report["warnings"]:
        console.print(f"Warning: {warning}", style="yellow", highlight=False)
