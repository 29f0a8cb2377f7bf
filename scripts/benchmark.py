"""Keep what a run measured, and draw the tables of the documents from what was kept.

    python scripts/benchmark.py record runs/conll-s0 --name conll2003-inject-minilm-l6-s0
    python scripts/benchmark.py record runs/matrix --name conll2003-transfer
    python scripts/benchmark.py paper hub_configs/runs/sat_lora-*.yaml --seeds 0 1 2 --output_dir runs/paper
    python scripts/benchmark.py tasks --model_name_or_path HOST --output results/mixed-tasks.json
    python scripts/benchmark.py scaling --model_name_or_path HOST --hosts HOST SMALLER --output results/scaling.json
    python scripts/benchmark.py latency --model_name_or_path H --output results/speed-latency-h.json
    python scripts/benchmark.py render

``record`` writes results/NAME.json from the folder that a run wrote (run_ner.py or run_classification.py): scores and
costs, settings, host, data, versions, hardware. Of a folder of transfer.py or pruned_hosts.py it keeps the table and
its picture, of one of ablation.py the table, of one of --do_search the trials.
``paper`` does the runs of a set of run configs that are not finished yet (see paper.py), and records each.
``tasks`` measures a batch of many tasks (see mixed_tasks.py), ``scaling`` how costs grow (see scaling.py),
``latency``, ``slopes``, ``train``, ``memory``, ``calibrate`` and ``size`` what an adapter costs on a host (see
speed.py).
``render`` writes results/README.md, the short table in README.md, the tables of docs/HOSTS.md and docs/SCALING.md, and
results/speed.md with its picture from those files alone.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from host_tables import host_tables
from modeling_unihyperlora import ConfigError, UniHyperLoraError
from modeling_unihyperlora.storage import replacing, write_json
from paper_picture import draw
from paper_tables import PICTURE, paper_page, rows_of
from scaling_tables import scaling_page, search_tables

RESULTS = Path(__file__).parent.parent / "results"
SETTINGS = (
    "method lora_r lora_alpha share_across_layers target_modules router train_scope max_steps "
    "per_device_train_batch_size learning_rate num_train_epochs coordinate_epochs lr_scheduler_type warmup_steps "
    "delta_learning_rate head_learning_rate weight_decay lambda_f lambda_q seed bf16 max_seq_length"
).split()
MARKS = ("<!-- results -->", "<!-- end of results -->")
HOST_MARKS = ("<!-- hosts -->", "<!-- end of hosts -->")
COLUMNS = (
    *("data", "method", "host", "scope", "steps × batch", "rate", "λ_F", "seeds", "F1"),
    *("file, B", "head, B", "δθ, B", "extra multiply-adds", "atoms a token", "CPU, s"),
)
BASELINE_SCOPES = {"sat_lora": "atoms and head", "probe": "head", "lora": "LoRA and head", "full": "all weights"}
VERSIONS = ("torch", "transformers", "accelerate", "seqeval")
WITH_PICTURE = ("transfer_matrix", "pruned_hosts")  # what transfer.py and pruned_hosts.py call their files
PAPER = "paper"  # folder under results/ of the runs of the paper's comparison
ABLATION = "ablation.json"  # what ablation.py calls its own
SEARCH = "search.json"  # and what --do_search does


def main(command_line: list[str] | None = None) -> None:
    import mixed_tasks
    import paper  # here, because the runs of a matrix are recorded with this module
    import scaling
    import speed
    import speed_report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser(
        "record", allow_abbrev=False, help="keep the results of one run, or of a transfer matrix"
    )
    record.add_argument("folder", type=Path)
    record.add_argument("--name", required=True)
    what = "do and keep the runs of a set of run configs"
    paper.add_arguments(commands.add_parser("paper", help=what, allow_abbrev=False))  # --seed is no --seeds
    mixed_tasks.add_arguments(commands.add_parser("tasks", allow_abbrev=False, help="measure a batch of many tasks"))
    what = "measure how costs grow with tokens, sentences, batch and hosts"
    scaling.add_arguments(commands.add_parser("scaling", allow_abbrev=False, help=what))
    for command in speed.COMMANDS:
        speed.add_arguments(command, commands.add_parser(command, allow_abbrev=False, help="see speed.py"))
    commands.add_parser("render", allow_abbrev=False, help="write results/README.md")
    args, passed = parser.parse_known_args(command_line)
    if passed and args.command != "paper":
        parser.error(f"unrecognized arguments: {' '.join(passed)}")
    if args.command == "paper":
        for folder, kind in paper.run_all(args, passed):
            write_json(RESULTS / PAPER / f"{folder.name}.json", record_of(folder) | {"kind": kind})
    elif args.command in speed.COMMANDS:
        speed.run(args.command, args)
    elif args.command == "tasks":
        mixed_tasks.measure(args)
    elif args.command == "scaling":
        scaling.measure(args)
    elif args.command == "record":
        drawn = [stem for stem in WITH_PICTURE if (args.folder / f"{stem}.json").is_file()]
        if drawn:
            keep_with_picture(args.folder / drawn[0], args.name)
        elif (args.folder / ABLATION).is_file():
            write_json(RESULTS / f"{args.name}.json", ablation_of(args.folder))
        elif (args.folder / SEARCH).is_file():
            write_json(RESULTS / f"{args.name}.json", search_of(args.folder))
        else:
            write_json(RESULTS / f"{args.name}.json", record_of(args.folder))
    else:
        records = read_records(RESULTS)
        if compared := [record for record in records.values() if record.get("kind") == "paper"]:
            draw(rows_of(compared), RESULTS / PICTURE)
        readme, hosts = RESULTS.parent / "README.md", RESULTS.parent / "docs" / "HOSTS.md"
        scaling = RESULTS.parent / "docs" / "SCALING.md"
        for path, text in {
            RESULTS / "README.md": rendered(records),
            readme: between(readme.read_text(encoding="utf-8"), *MARKS, summary(records)),
            hosts: between(hosts.read_text(encoding="utf-8"), *HOST_MARKS, host_tables(records)),
            scaling: scaling_page(scaling.read_text(encoding="utf-8"), records),
        }.items():
            with replacing(path) as temporary:
                Path(temporary).write_text(text, encoding="utf-8")
        if of_speed := _of_kind(records, "speed"):
            speed_report.write(of_speed, RESULTS)


def record_of(folder: Path) -> dict[str, object]:
    """All that is worth keeping of a finished run; folders on the machine are not.

    Raises:
        ConfigError: the folder is not one that a run finished.
    """
    try:
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        run = json.loads((folder / "run_arguments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no finished run ({error}). Give the --output_dir of a run.") from error
    config = Path(run.get("adapter") or folder) / "config.json"
    adapter = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    hosts = [{**host, "name": Path(host["name"] or "").name} for host in adapter.get("source_hosts") or []]
    return {
        "run_config": run.get("run_config") and Path(run["run_config"]).stem,
        "settings": {name: None if run.get(name) == "None" else run.get(name) for name in SETTINGS},
        "pathway": adapter.get("pathway"),
        "projector": adapter.get("projector"),
        "host": Path(run.get("model_name_or_path") or "").name,
        "source_hosts": hosts,
        "data": run["data"],
        "results": results,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def between(text: str, begin: str, end: str, new: str) -> str:
    """A document with what is between two marks replaced."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def keep_with_picture(written: Path, name: str) -> None:
    """Keep a table and its picture: results/NAME.json and results/NAME.png.

    Args:
        written: path of the two files without their endings.
        name: what to call them.

    Raises:
        ConfigError: one of them cannot be read.
    """
    try:
        matrix = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
        picture = written.with_suffix(".png").read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{written.parent} holds no whole matrix ({error}). Give the --output_dir of transfer.py or "
            "pruned_hosts.py."
        ) from error
    with replacing(RESULTS / f"{name}.png") as temporary:
        Path(temporary).write_bytes(picture)
    write_json(RESULTS / f"{name}.json", matrix)


def ablation_of(folder: Path) -> dict[str, object]:
    """What ablation.py wrote, with the settings of its first run.

    Raises:
        ConfigError: it cannot be read, or its first run is not finished.
    """
    try:
        table = json.loads((folder / ABLATION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / ABLATION} cannot be read ({error}). Give the folder of ablation.py.") from error
    first = record_of(folder / "00")
    kept = {name: first[name] for name in ("settings", "host", "data", "versions", "hardware")}
    return kept | {"kind": "ablation", "rows": table["rows"]}


def search_of(folder: Path) -> dict[str, object]:
    """What --do_search found, beside the run of its best trial."""
    best = record_of(folder)
    found = json.loads((folder / SEARCH).read_text(encoding="utf-8"))
    kept = {name: best[name] for name in ("settings", "pathway", "host", "data", "results", "versions", "hardware")}
    return {"kind": "search"} | kept | {"search": found}


def read_records(folder: Path) -> dict[str, dict]:
    paths = [*sorted(folder.glob("*.json")), *sorted((folder / PAPER).glob("*.json"))]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def rendered(records: dict[str, dict]) -> str:
    """The tables as Markdown: runs that differ in nothing but their seed share a row; a table for each matrix."""
    matrices, ablations, searches, compared, trials, records = (
        _of_kind(records, kind) for kind in ("transfer", "ablation", "search", "paper", "paper_rate", None)
    )
    lines = [
        "# Results",
        "",
        "Written by `python scripts/benchmark.py render` from the JSON files beside this page, one a run.",
        "F1 on the whole validation split, mean ± standard deviation over the seeds: seqeval's micro F1 for tags, the",
        "macro F1 for classes. CPU is the time of all threads of a run's process, from its start to its last score.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for key, runs in _rows(records):
        first, settings = runs[0]["results"], runs[0]["settings"]
        seeds = ", ".join(str(seed) for seed in sorted(run["settings"]["seed"] for run in runs))
        trained = first["train_runtime"] is not None
        cells = [
            *key[:4],
            _length(settings) if trained else "–",
            f"{settings['learning_rate']:g}" if trained else "–",
            f"{settings['lambda_f']:g}" if trained and settings["method"] == "unihyperlora" else "–",
            seeds,
            mean_and_deviation(run["results"]["eval_f1"] for run in runs),
            *(_count(first[name]) for name in ("adapter_bytes", "head_bytes", "delta_bytes")),
            "–" if first["flops_overhead_pct"] is None else f"{first['flops_overhead_pct']:.2f} %",
            mean_and_deviation((run["results"]["active_atoms_per_token"] for run in runs), digits=2),
            cpu_seconds(runs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    universal = [run for run in records.values() if run["settings"]["method"] == "unihyperlora" and run["pathway"]]
    for pathway in sorted({run["pathway"] for run in universal}):
        parts = next(run["results"] for run in universal if run["pathway"] == pathway)
        lines += ["", f"Bytes of one file by part, pathway {pathway}:", "", "| part | bytes |", "|---|---|"]
        lines += [
            f"| {name.removeprefix('bytes_of_')} | {value:,} |"
            for name, value in sorted(parts.items())
            if name.startswith("bytes_of_")
        ]
    for name, matrix in matrices.items():
        lines += transfer_table(name, matrix)
    for name, ablation in ablations.items():
        lines += ablation_table(name, ablation)
    lines += search_tables(searches)
    lines += paper_page([*compared.values()], [*trials.values()], matrices)
    return "\n".join(lines) + "\n"


def ablation_table(name: str, ablation: dict) -> list[str]:
    """An ablation as Markdown lines: a row for each change, with the difference to what ships."""
    shipped = ablation["rows"][0]["f1"]
    hosts = sorted(shipped, key=lambda host: host != "source")  # the source first
    settings, sentences = ablation["settings"], ablation["data"]["splits"]["train"]["sentences"]
    lines = [
        *("", f"## {name}", ""),
        f"The stream with one thing changed, trained on {ablation['host']} on {sentences:,} sentences of "
        f"{ablation['data']['name']} ({settings['coordinate_epochs']:g} epochs for the coordinates, then "
        f"{settings['max_steps']} steps × {settings['per_device_train_batch_size']}), seed {settings['seed']}; "
        "F1 there and zero-shot, and the difference to the first row.",
        "",
        "| | " + " | ".join(f"{host} | Δ" for host in hosts) + " |",
        "|---" * (1 + 2 * len(hosts)) + "|",
    ]
    for row in ablation["rows"]:
        cells = [f"{row['f1'][host]:.4f} | {row['f1'][host] - shipped[host]:+.4f}" for host in hosts]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return lines


def transfer_table(name: str, matrix: dict) -> list[str]:
    """A transfer matrix as Markdown lines: its picture, and its targets as rows."""
    metric = "macro F1" if matrix["task"] == "classification" else "F1"
    size = _count(matrix["adapter_bytes"])
    columns = [column["label"] for column in matrix["columns"]]
    names = [
        "target",
        "adapter from",
        f"{metric} there",
        *columns,
        "zero-shot / own",
        "refined / own",
        "calibration, s",
        "R² a knot",
    ]
    lines = [
        *["", f"## {name}", ""],
        f"Data {matrix['data']['name']}, {metric}, seeds {', '.join(map(str, matrix['seeds']))}; a file of {size} B. "
        "Zero-shot: no label of the target, no gradient step.",
        *["", f"![Scores of one adapter file on hosts it has not seen]({name}.png)", ""],
        *["| " + " | ".join(names) + " |", "|---" * len(names) + "|"],
    ]
    for target, row in matrix["targets"].items():
        fit = row["calibration_r2"]
        cells = [target, ", ".join(row["source_hosts"]), _figure(row["source_f1"])]
        cells += [_figure(row[f"{column['key']}_f1"]) for column in matrix["columns"]]
        cells += [_figure(row.get(f"{way}_over_own_stream"), 3) for way in ("zero_shot", "refined")]
        cells.append(_figure(row["calibration_seconds"], 1))
        cells.append(" ".join(f"{value:.2f}" for value in fit["mean"]) if fit else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary(records: dict[str, dict]) -> str:
    """What a reader wants first: data, method, host, how it came there, F1, size."""
    lines = ["| data | method | host | scope | seeds | F1 | file, B | CPU, s |", "|---" * 8 + "|"]
    for key, runs in _rows(_of_kind(records, None)):
        scores = mean_and_deviation((run["results"]["eval_f1"] for run in runs), digits=3)
        cells = [*key[:4], str(len(runs)), scores, _count(runs[0]["results"]["adapter_bytes"])]
        cells.append(cpu_seconds(runs))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _of_kind(records: dict[str, dict], kind: str | None) -> dict[str, dict]:
    """Records of one kind; a run has none."""
    return {name: record for name, record in records.items() if record.get("kind") == kind}


def _rows(records: dict[str, dict]) -> list[tuple[tuple, list[dict]]]:
    """Runs that differ in nothing but their seed, together; in the order of what they are called."""
    rows: dict[tuple, list[dict]] = {}
    for record in records.values():
        rows.setdefault(_row_key(record), []).append(record)
    return sorted(rows.items(), key=lambda item: str(item[0]))


def _row_key(record: dict) -> tuple[str, ...]:
    settings = record["settings"]
    kind, scope = [settings["method"]], settings["train_scope"]
    if settings["method"] == "unihyperlora":
        kind += [record["pathway"], record["projector"]]
    elif settings["method"] in ("lora", "sat_lora"):
        kind.append(f"r={settings['lora_r']}")
    if record["results"]["train_runtime"] is None:
        scope = "zero-shot from " + ", ".join(host["name"] for host in record["source_hosts"])
    elif settings["method"] in BASELINE_SCOPES:
        scope = BASELINE_SCOPES[settings["method"]]
    told = ("seed", "lora_r")
    rest = sorted((name, str(value)) for name, value in settings.items() if value is not None and name not in told)
    return (record["data"]["name"], ", ".join(kind), record["host"], scope, str(rest))


def _length(settings: dict) -> str:
    steps, batch = settings["max_steps"], settings["per_device_train_batch_size"]
    return f"{steps} × {batch}" if steps > 0 else f"{settings['num_train_epochs']:g} epochs × {batch}"


def mean_and_deviation(values: Iterable[float | None], digits: int = 4) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def cpu_seconds(runs: list[dict]) -> str:
    """Of early records some do not have it."""
    return mean_and_deviation((run["results"].get("cpu_seconds") for run in runs), digits=0)


def _figure(figure: dict | None, digits: int = 4) -> str:
    return mean_and_deviation(figure["seeds"].values() if figure else [], digits)


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"benchmark: {error}")
