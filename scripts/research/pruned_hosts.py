"""Scores an adapter on hosts without their upper blocks; each pruned host is aligned separately, without training.

    python -m scripts.research.pruned_hosts --adapter runs/conll --hosts mpnet-12l-768 minilm-l6-384 \
        --layers "2 4 6 8" "2 3 4" --validation_file dev.jsonl --output_dir runs/pruned
    python -m scripts.research.benchmark record runs/pruned --name conll2003-pruned-hosts

--layers gives the numbers of first blocks to keep of each host; the whole host is scored too. Beside F1 the table has
the agreement that ``unihyperlora inspect`` finds without a label, and its rank correlation with F1. The script writes
pruned_hosts.json and pruned_hosts.png. Every score comes from a run of run_ner.py in its own folder under runs/. A
finished run with the same flags, data and hosts is not repeated. Unknown flags are passed to the runs.
"""

import argparse
import math
import sys
from pathlib import Path

from scipy.stats import spearmanr
from torch import nn

from modeling_unihyperlora import ConfigError, UniHyperLoraError
from modeling_unihyperlora.hosts import describe_host, fingerprint, load_host
from modeling_unihyperlora.measure.inspection import inspect_on_host
from modeling_unihyperlora.sites import layout_of, num_layers_of
from modeling_unihyperlora.storage import WEIGHTS_NAME, replacing, write_json
from modeling_unihyperlora.words import load_tokenizer
from scripts.research.records import record_of
from scripts.research.runner import Cell, Runner, digest_of, flag_name, name_of, show_progress
from scripts.research.transfer_picture import INK, require_matplotlib
from trainers.results import require_writable

STEM = "pruned_hosts"  # name of the two files without their suffixes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9")
SET_HERE = ("model_name_or_path", "adapter", "do_train", "do_eval", "do_predict", "output_dir")


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run the missing runs, and write the scores and their picture.

    Returns:
        The content of ``pruned_hosts.json``.

    Raises:
        UniHyperLoraError: the input is bad, or a run fails; finished runs are kept.
    """
    show_progress()
    args, passed = parse(command_line)
    digests = {args.validation_file: digest_of(args.validation_file)}
    digests[args.adapter] = digest_of(str(Path(args.adapter) / WEIGHTS_NAME))
    folder, rows = Path(args.output_dir), []
    runner = Runner(folder / "runs", "run_ner", digests)
    for name, depths in zip(args.hosts, args.layers, strict=True):
        host = load_host(name)
        whole = describe_host(host, name_of(name), num_layers_of(host))
        for layers in [*depths, whole["num_layers"]]:
            pruned = prune(name, layers, folder / "hosts" / f"{name_of(name)}-first-{layers}")
            digests[str(pruned)] = fingerprint(load_host(str(pruned)))
            flags = ["--adapter", args.adapter, "--model_name_or_path", str(pruned), "--do_eval"]
            flags += ["--save_strategy", "no", "--validation_file", args.validation_file, *passed]
            cell = Cell(pruned.name, tuple(flags), keep_weights=False)
            runner.run(cell)
            results = runner.results(cell)
            figures = {
                key: results[key] for key in ("eval_f1", "calibration_r2", "flops_overhead_pct", "adapter_bytes")
            }
            [figures["agreement"]] = inspect_on_host(args.adapter, str(pruned))["agreement"].values()
            rows.append({"host": whole["name"], "layers": layers, "of": whole["num_layers"]} | figures)
    record = record_of(folder / "runs" / cell.name)
    kept = {key: record[key] for key in ("source_hosts", "data", "versions", "hardware")}
    curve = kept | {"kind": STEM, "rows": rows, "rank_correlation": rank_correlation(rows)}
    write_json(folder / f"{STEM}.json", curve)
    draw(curve, folder / f"{STEM}.png")
    return curve


def rank_correlation(rows: list[dict]) -> dict[str, float | None]:
    """Spearman's correlation of F1 over the hosts with two figures that need no label: agreement, and the mean R².

    None where a figure, or F1, is the same on all hosts.
    """
    scores = [row["eval_f1"] for row in rows]
    figures = {
        "agreement": [row["agreement"] for row in rows],
        "mean_r2": [sum(row["calibration_r2"]) / len(row["calibration_r2"]) for row in rows],
    }
    found = {}
    for name, values in figures.items():
        defined = len({*scores}) > 1 and len({*values}) > 1
        found[name] = float(spearmanr(scores, values).statistic) if defined else None
    return found


def parse(command_line: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; returns this script's arguments and the flags for the runs.

    Raises:
        ConfigError: an argument is not allowed, or two arguments contradict each other.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapter", required=True, help="Folder of a stream adapter.")
    parser.add_argument("--hosts", nargs="+", required=True, help="Hosts to prune: folders or Hub ids.")
    parser.add_argument("--layers", nargs="+", required=True, help='Blocks to keep, for each host: "2 4 6 8".')
    parser.add_argument("--validation_file", required=True, help="File to score.")
    parser.add_argument("--output_dir", required=True)
    args, passed = parser.parse_known_args(command_line)
    try:
        args.layers = [sorted({int(number) for number in of_host.split()}) for of_host in args.layers]
    except ValueError as error:
        raise ConfigError(
            f'--layers needs numbers of blocks, one string per host, such as "2 4 6 8" "2 3 4": {error}.'
        ) from error
    if len(args.layers) != len(args.hosts):
        raise ConfigError(f"--layers has {len(args.layers)} strings for {len(args.hosts)} hosts; give one per host.")
    for part in passed:
        if part.startswith("--") and flag_name(part) in SET_HERE:
            raise ConfigError(f"This script sets {part} for each run; leave it out.")
    require_writable(args.output_dir)
    require_matplotlib()
    return args, passed


def prune(name: str, layers: int, folder: Path) -> Path:
    """Save a host with only its first ``layers`` blocks, and its tokenizer.

    Raises:
        ConfigError: the host has fewer blocks, or its family cannot be pruned.
    """
    host = load_host(name)
    layout = layout_of(host)
    path = next((p for p in layout.paths("block") if p.endswith(".{}")), None) if layout else None
    if path is None or layout.shared_blocks:
        raise ConfigError(f"Hosts of the family '{host.config.model_type}' cannot be pruned by blocks. Give others.")
    blocks = host.get_submodule(path.removesuffix(".{}"))
    if not 1 <= layers <= len(blocks):
        raise ConfigError(f"'{name}' has {len(blocks)} blocks; {layers} cannot be kept. Correct --layers.")
    host.set_submodule(path.removesuffix(".{}"), nn.ModuleList(blocks[:layers]))
    host.config.num_hidden_layers = layers
    host.save_pretrained(folder)
    load_tokenizer(name).save_pretrained(folder)
    return folder


def draw(curve: dict[str, object], path: Path) -> None:
    """Draw F1 against the number of remaining blocks, with one line per host."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    hosts = list(dict.fromkeys(row["host"] for row in curve["rows"]))
    for number, host in enumerate(hosts):
        rows = [row for row in curve["rows"] if row["host"] == host]
        layers, scores = [row["layers"] for row in rows], [row["eval_f1"] for row in rows]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(layers, scores, color=colour, marker="o", linewidth=1.8, label=host)
        for point in zip(layers, scores, strict=True):
            best = max(row["eval_f1"] for row in curve["rows"] if row["layers"] == point[0])
            place = {"xytext": (0, 7 if point[1] == best else -14), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{point[1]:.3f}", point, fontsize=8, color=colour, **place)
    axes.set_xlabel("blocks left (the last point of a line is the whole host)", color=INK)
    axes.set_ylabel("entity F1", color=INK)
    axes.set_xticks(sorted({row["layers"] for row in curve["rows"]}))
    axes.set_ylim(math.floor(20 * min(row["eval_f1"] for row in curve["rows"]) - 1) / 20, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    names = " and ".join(host["name"] for host in curve["source_hosts"])
    figure.suptitle(f"One adapter from {names}, zero-shot on hosts with fewer blocks", fontsize=11, color=INK)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"pruned_hosts: {error}")
    except KeyboardInterrupt:
        sys.exit("pruned_hosts: interrupted; the same command continues with the unfinished runs.")
