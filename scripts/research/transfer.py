"""Trains an adapter on some hosts, scores the same file on unseen hosts, and draws the result.

    python -m scripts.research.transfer --source_hosts A B --target_hosts C D --train_file train.jsonl \
        --validation_file dev.jsonl --seeds 0 1 2 --output_dir runs/matrix --num_train_epochs 6
    python -m scripts.research.transfer --source_hosts A B C D --leave_one_out …  # each host is the target once
    python -m scripts.research.transfer … --only zero_shot probe                  # these columns first, others later

The script writes transfer_matrix.json and transfer_matrix.png, and unlabelled.txt with the text of the training file,
on which the column "refined" aligns the targets. Every score comes from a run of run_ner.py (or run_classification.py)
in its own folder under runs/. A finished run with the same flags, data and hosts is not repeated, so the same command
continues an interrupted matrix. Unknown flags are passed to the runs. Baselines do not get the flags for learning
rates and for new streams; they have --baseline_args.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from modeling_unihyperlora import ConfigError, UniHyperLoraError
from modeling_unihyperlora.hosts import describe_host, load_host
from modeling_unihyperlora.sites import num_layers_of
from modeling_unihyperlora.space import PACKAGE_SPACE
from modeling_unihyperlora.storage import replacing, write_json
from scripts.research.records import record_of
from scripts.research.runner import Cell, Runner, digest_of, flag_name, name_of, show_progress
from scripts.research.transfer_picture import draw, require_matplotlib
from scripts.research.transfer_plan import COLUMNS, FILES, LORA_R, TEXT, Plan
from trainers.arguments import parse as parse_run
from trainers.results import require_writable
from trainers.running import read_split
from trainers.tasks import TASKS

logger = logging.getLogger("scripts.research.transfer")

METRICS = {"ner": ("f1",), "classification": ("f1", "accuracy")}
LEAST_GAP = 0.03  # minimum F1 difference of a stream and a probe for a meaningful "gap recovered"
SET_HERE = (  # flags that this script sets for each run
    "model_name_or_path adapter method pathway lora_r train_scope do_train do_eval do_predict seed refine_file "
    "refine_host"
).split()
Value = float | list[float] | None


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run the missing runs, and write the matrix and its picture.

    Returns:
        The content of ``transfer_matrix.json``.

    Raises:
        UniHyperLoraError: the input is bad, or a run fails; finished runs are kept.
    """
    show_progress()
    args, passed = parse(sys.argv[1:] if command_line is None else command_line)
    check(args, passed)
    digests = {path: digest_of(path) for path in (getattr(args, name) for name in FILES) if path}
    digests |= {path: digest_of(path) for path in [*passed, str(PACKAGE_SPACE)] if Path(path).is_file()}
    hosts = {host: description_of(host) for host in all_hosts(args)}
    digests |= {host: description["fingerprint"] for host, description in hosts.items()}

    folder, plan = Path(args.output_dir), Plan(args, passed)
    runner = Runner(folder / "runs", TASKS[args.task].script, digests)
    if "refined" in args.only and args.train_file:
        write_training_text(args, passed)
    for column in COLUMNS:
        for target in plan.targets if column in args.only else ():
            for cell in plan.cells(column, target).values():
                runner.run(cell)
    matrix = matrix_of(plan, runner, hosts, passed)
    write_json(folder / "transfer_matrix.json", matrix)
    draw(matrix, folder / "transfer_matrix.png")
    logger.info("%s and its picture are written.", folder / "transfer_matrix.json")
    return matrix


# ---- the command line ----


def parse(command_line: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; returns this script's arguments and the flags for the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--source_hosts", nargs="+", required=True, help="Hosts to train the adapter on: folders or Hub ids.")
    add("--target_hosts", nargs="+", default=[], help="Unseen hosts to score the adapter on.")
    add("--leave_one_out", action="store_true", help="Score each source host with an adapter of the others.")
    add("--task", choices=sorted(TASKS), default="ner")
    add("--train_file", help="File to train the adapter and the comparisons on.")
    add("--validation_file", help="File to score.")
    add("--seeds", type=int, nargs="*", default=[0])
    add("--output_dir", required=True)
    add(
        "--only",
        nargs="+",
        choices=COLUMNS,
        default=COLUMNS,
        help="Columns to run; others only show finished runs.",
    )
    add("--delta_steps", type=int, default=500, help="Training steps of δθ, on a target's labels.")
    add("--baseline_steps", type=int, default=500, help="Steps of the probe and of LoRA.")
    add("--baseline_seeds", type=int, nargs="+", help="Seeds of the probe and of LoRA; default: --seeds.")
    add("--baseline_args", default="", help='Further flags of the probe and of LoRA, such as "--bf16 --use_cpu".')
    add("--lora_hosts", nargs="+", default=[], help="Targets to train a LoRA on; default: all.")
    args, passed = parser.parse_known_args(with_value_joined(command_line, "--baseline_args"))
    args.baseline_seeds = args.baseline_seeds or args.seeds
    return args, passed


def with_value_joined(command_line: list[str], flag: str) -> list[str]:
    """Join ``flag value`` to ``flag=value``, since argparse reads a value that starts with dashes as a flag."""
    if flag not in command_line[:-1]:
        return command_line
    at = command_line.index(flag)
    return [*command_line[:at], f"{flag}={command_line[at + 1]}", *command_line[at + 2 :]]


def check(args: argparse.Namespace, passed: list[str]) -> None:
    """Check the arguments before any host is loaded.

    Raises:
        ConfigError: an argument is not allowed, or two arguments contradict each other.
    """
    if args.leave_one_out and args.target_hosts:
        raise ConfigError("--leave_one_out makes each of --source_hosts a target; leave --target_hosts out.")
    if args.leave_one_out and len(args.source_hosts) < 2:
        raise ConfigError("--leave_one_out needs at least two hosts in --source_hosts.")
    if not args.leave_one_out and not args.target_hosts:
        raise ConfigError("No target: give --target_hosts, or --leave_one_out.")
    if both := sorted({*map(_same, args.source_hosts)} & {*map(_same, args.target_hosts)}):
        raise ConfigError(
            f"{both[0]} is a source and a target, so its score would not be zero-shot. Remove it from one of the two "
            "lists, or give all hosts as --source_hosts with --leave_one_out."
        )
    names = [name_of(host) for host in (*args.source_hosts, *args.target_hosts)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Two hosts are called {twice[0]}; the matrix needs different names, so rename a folder.")
    targets = args.target_hosts or args.source_hosts
    if unknown := [host for host in args.lora_hosts if name_of(host) not in map(name_of, targets)]:
        raise ConfigError(f"--lora_hosts {unknown[0]} is not a target. Choose: {', '.join(map(name_of, targets))}.")
    if not args.seeds or len({*args.seeds}) < len(args.seeds):
        raise ConfigError("--seeds needs one or more different numbers.")
    for name in ("delta_steps", "baseline_steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} trains nothing; give 1 or more.")
    for part in passed:
        if part.startswith("--") and flag_name(part) in SET_HERE:
            raise ConfigError(f"This script sets {part} for each run; leave it out.")
    require_writable(args.output_dir)
    require_matplotlib()


def _same(host: str) -> str:
    """Canonical form of a host: the absolute path of a folder, or the Hub id."""
    return str(Path(host).resolve()) if Path(host).is_dir() else host


def description_of(host: str) -> dict[str, object]:
    """Description of a host for the matrix."""
    loaded = load_host(host)
    return describe_host(loaded, name_of(host), num_layers_of(loaded))


def all_hosts(args: argparse.Namespace) -> list[str]:
    return [*args.source_hosts, *args.target_hosts]


def write_training_text(args: argparse.Namespace, passed: list[str]) -> None:
    """Write the words of the training file without labels, one sentence per line."""
    task = TASKS[args.task]
    flags = ["--train_file", args.train_file, "--output_dir", args.output_dir]
    _, data_args, _ = parse_run([*passed, *flags], task.arguments)
    rows, _ = read_split(task, data_args, "train", data_args.id_names())
    with replacing(Path(args.output_dir) / TEXT) as temporary:
        text = "".join(" ".join(task.words(row)) + "\n" for row in rows)
        Path(temporary).write_text(text, encoding="utf-8")


# ---- the matrix ----


def matrix_of(plan: Plan, runner: Runner, hosts: dict[str, dict], passed: list[str]) -> dict[str, object]:
    """The matrix: target → figures; figures of unfinished runs are None.

    A figure is {mean, sd, seeds: {seed: value}}; with one seed, sd is None.
    """
    args, keys = plan.args, column_keys(plan.args)
    rows = {name_of(target): row_of(plan, runner, target, keys) | hosts[target] for target in plan.targets}
    first = next(iter(rows.values()))
    finished = (cell for cell in all_cells(plan) if runner.results(cell) is not None)
    record = record_of(runner.folder / next(finished).name)
    described = {name: record[name] for name in ("settings", "data", "versions", "hardware")}
    described["settings"] = {name: value for name, value in described["settings"].items() if name != "seed"}
    return described | {
        "kind": "transfer",
        "task": args.task,
        "leave_one_out": args.leave_one_out,
        "seeds": args.seeds,
        "flags": [without_folder(part) for part in passed],
        "baseline_flags": [without_folder(part) for part in args.baseline_args.split()],
        "delta_steps": args.delta_steps,
        "baseline_steps": args.baseline_steps,
        "columns": [{"key": key, "label": label} for key, label in keys.values()],
        "source_hosts": [hosts[host] for host in args.source_hosts],
        "source_f1": None if args.leave_one_out else first["source_f1"],
        "adapter_bytes": max((row["adapter_bytes"] for row in rows.values() if row["adapter_bytes"]), default=None),
        "space": next((row["space"] for row in rows.values() if row["space"]), None),
        "targets": rows,
    }


def column_keys(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Column → (prefix of its keys in the matrix, label), in the order of the matrix."""
    return {
        "zero_shot": ("zero_shot", "zero-shot"),
        "refined": ("refined", "zero-shot + unlabelled text"),
        "own_stream": ("own_stream", "stream trained on this host"),
        "lora": (f"lora_r{LORA_R}", f"LoRA r={LORA_R} trained on this host"),
        "delta": (f"delta_{args.delta_steps}", f"zero-shot + {args.delta_steps} steps on δθ"),
        "probe": ("probe", "linear probe trained on this host"),
        "shuffled": ("shuffled", "control: shuffled anchors"),
        "random_map": ("random_map", "control: random map"),
    }


def row_of(plan: Plan, runner: Runner, target: str, keys: dict[str, tuple[str, str]]) -> dict[str, object]:
    """The figures of one target."""
    cells = {column: plan.cells(column, target) for column in COLUMNS}
    cells["source"] = {seed: plan.source(target, seed) for seed in plan.args.seeds}
    found = {
        column: {seed: runner.results(cell) or {} for seed, cell in of_column.items()}
        for column, of_column in cells.items()
    }
    names = {column: key for column, (key, _) in keys.items()} | {"source": "source"}

    def figure(column: str, name: str) -> dict | None:
        return summarise({seed: results.get(name) for seed, results in found[column].items()})

    def over_own_stream(column: str) -> dict | None:
        own, moved = found["own_stream"], found[column]
        return summarise({seed: ratio(moved[seed].get("eval_f1"), own[seed].get("eval_f1")) for seed in moved})

    row = {
        f"{names[column]}_{metric}": figure(column, f"eval_{metric}")
        for column in names
        for metric in METRICS[plan.args.task]
    }
    sources = [results for results in found["source"].values() if results]
    return row | {
        "source_hosts": [name_of(host) for host in plan.sources(target)],
        "adapter_bytes": max((results.get("adapter_bytes") for results in sources), default=None),
        "space": next((results.get("space") for results in sources), None),
        "zero_shot_over_own_stream": over_own_stream("zero_shot"),
        "refined_over_own_stream": over_own_stream("refined"),
        "gap_recovered": gap_recovered(row["zero_shot_f1"], row["probe_f1"], row["own_stream_f1"]),
        "calibration_seconds": figure("zero_shot", "calibration_seconds"),
        "calibration_r2": figure("zero_shot", "calibration_r2"),
        "train_seconds": {names[column]: figure(column, "train_runtime") for column in names},
    }


def summarise(values: Mapping[int, Value]) -> dict[str, object] | None:
    """Mean, sample standard deviation and values over seeds; lists are summarised by item. None without values."""
    known = {seed: value for seed, value in values.items() if value is not None}
    if not known:
        return None

    def over_seeds(measure: Callable) -> Value:
        items = list(known.values())
        return (
            [measure(column) for column in zip(*items, strict=True)] if isinstance(items[0], list) else measure(items)
        )

    deviation = over_seeds(statistics.stdev) if len(known) > 1 else None
    return {"mean": over_seeds(statistics.fmean), "sd": deviation, "seeds": {str(s): v for s, v in known.items()}}


def ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def gap_recovered(moved: dict | None, probe: dict | None, own: dict | None) -> float | None:
    """(zero-shot − probe) / (own stream − probe), on the means over seeds.

    None if own stream and probe differ by less than ``LEAST_GAP``: a few tenths of a point would then dominate.
    """
    if moved is None or probe is None or own is None or own["mean"] - probe["mean"] < LEAST_GAP:
        return None
    return (moved["mean"] - probe["mean"]) / (own["mean"] - probe["mean"])


def all_cells(plan: Plan) -> list[Cell]:
    """All runs, sources first."""
    sources = [plan.source(target, seed) for target in plan.targets for seed in plan.args.seeds]
    others = [plan.cells(column, target).values() for column in COLUMNS for target in plan.targets]
    return [*sources, *(cell for cells in others for cell in cells)]


def without_folder(part: str) -> str:
    """Part of a command line, with a path shortened to its last part, so that no local folder is recorded."""
    flag, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
    return flag + equals + (Path(value).name if "/" in value else value)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"transfer: {error}")
    except KeyboardInterrupt:
        sys.exit("transfer: interrupted; the same command continues with the unfinished runs.")
