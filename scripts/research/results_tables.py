"""Renders the pages of results/ and the short table of README.md as Markdown, from the records only."""

import statistics
from collections.abc import Iterable

from scripts.research.paper_tables import paper_page, paper_summary
from scripts.research.records import of_kind
from scripts.research.scaling_tables import search_tables

COLUMNS = (
    *("data, sentences", "method", "host", "scope", "steps × batch", "rate", "λ_F", "seeds", "F1"),
    *("file, B", "reader, B", "head, B", "δθ, B", "extra multiply-adds", "atoms a token", "CPU, s", "states, CPU s"),
)
WRITTEN = "Written by `python -m scripts.research.benchmark render` from the JSON files and lines beside this page."
BASELINE_SCOPES = {"sat_lora": "atoms and head", "probe": "head", "lora": "LoRA and head", "full": "all weights"}


def pages(records: dict[str, dict]) -> dict[str, str]:
    """Name → text of the pages of results/: one for a reader in a hurry, and the long tables."""
    of = {kind: of_kind(records, kind) for kind in ("transfer", "ablation", "search", "paper", "paper_rate", None)}
    transfer = ["# Transfer to other hosts", "", WRITTEN]
    for name, matrix in of["transfer"].items():
        transfer += transfer_table(name, matrix)
    runs = ["# Single runs", *runs_table(of[None]), *ready_table(records)]
    for name, ablation in of["ablation"].items():
        runs += ablation_table(name, ablation)
    made = {
        "README.md": front_page(records, of["transfer"]),
        "transfer.md": transfer,
        "paper.md": paper_page([*of["paper"].values()], [*of["paper_rate"].values()]),
        "runs.md": runs + search_tables(of["search"]),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in made.items()}


def front_page(records: dict[str, dict], matrices: dict[str, dict]) -> list[str]:
    """The page for a reader in a hurry."""
    lines = ["# Results", "", WRITTEN, "", "## One file, on hosts that it never saw", ""]
    lines += transfer_summary(matrices, records)
    if matrices:
        name = max(matrices, key=lambda name: figures_in(matrices[name]))
        lines += ["", f"![Scores of one adapter file on hosts that it never saw]({name}.png)"]
    lines += ["", "All columns, flags, controls and costs: [transfer.md](transfer.md).", ""]
    lines += ["## Ready adapters", "", summary(records), ""]
    if compared := paper_summary([*of_kind(records, "paper").values()]):
        lines += ["## Beside LoRA, SAT-LoRA, full fine-tuning and a probe", "", *compared]
        lines += ["", "Every run with its costs: [paper.md](paper.md).", ""]
    return [
        *lines,
        "## More",
        "",
        "- [Speed and memory](speed.md)",
        "- [Single runs, bytes by part, searches](runs.md)",
    ]


def figures_in(matrix: dict) -> int:
    """How many scores a matrix has."""
    rows = matrix["targets"].values()
    return sum(value is not None for row in rows for name, value in row.items() if name.endswith("_f1"))


def transfer_summary(matrices: dict[str, dict], records: dict[str, dict]) -> list[str]:
    """A short table of all transfer matrices. LoRA has 500 steps and the best of the rates that were tried."""
    heads = (
        *("matrix", "trained on", "F1 there", "used on", "F1, zero-shot", "own stream", "zero-shot / own"),
        *("500 steps of δθ", "LoRA r=8, 500 steps", "probe"),
    )
    lines = [
        "Zero-shot: neither a label nor a training step on the host. Own stream: an adapter that was trained on this",
        "host for as many steps. LoRA: the best of the learning rates that were tried.",
        *("", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"),
    ]
    for name, matrix in matrices.items():
        data, source = matrix["data"]["name"], ", ".join(host["name"] for host in matrix["source_hosts"])
        delta = f"delta_{matrix['delta_steps']}_f1"
        for target, row in matrix["targets"].items():
            cells = [name.replace("-transfer", ""), source, _figure(row["source_f1"]), target]
            cells += [_figure(row.get(figure)) for figure in ("zero_shot_f1", "own_stream_f1")]
            cells += [_figure(row.get("zero_shot_over_own_stream"), 3), _figure(row.get(delta))]
            lora = best_lora(records, data, target)
            cells += ["–" if lora is None else f"{lora:.4f}", _figure(row.get("probe_f1"))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def best_lora(records: dict[str, dict], data: str, host: str) -> float | None:
    """Best score of LoRA r=8 on a host over the learning rates of the paper's comparison; means over seeds."""
    by_rate: dict[float, list[float]] = {}
    for record in (*of_kind(records, "paper").values(), *of_kind(records, "paper_rate").values()):
        if record["run_config"] == f"lora-iter1-{data}" and record["host"] == host:
            by_rate.setdefault(record["settings"]["learning_rate"], []).append(record["results"]["eval_f1"])
    return max(map(statistics.mean, by_rate.values()), default=None)


def runs_table(records: dict[str, dict]) -> list[str]:
    """Runs on their own; those that differ only in their seed share a row."""
    lines = [
        "",
        "Sentences: how many a run trained on and scored, or only scored. CoNLL's validation split has 3,250, its",
        "test split 3,453; btc has tweets. Runs that only score an adapter name the data that it was trained on. F1",
        "is the mean ± standard deviation over the seeds: seqeval's micro F1 for tags,",
        "macro F1 for classes. CPU is the time of all threads of a run's process, from its start to its last score.",
        "The states' part of it is the time for computing the sources' states of anchors and text; it is near zero if",
        "an earlier run has cached them.",
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
            *(_count(first.get(name)) for name in ("adapter_bytes", "reader_bytes", "head_bytes", "delta_bytes")),
            "–" if first["flops_overhead_pct"] is None else f"{first['flops_overhead_pct']:.2f} %",
            mean_and_deviation((run["results"]["active_atoms_per_token"] for run in runs), digits=2),
            cpu_seconds(runs),
            cpu_seconds(runs, "host_cpu_seconds"),
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
    return lines


def ablation_table(name: str, ablation: dict) -> list[str]:
    """An ablation as Markdown lines: a row for each change, with the difference from the shipped design."""
    shipped = ablation["rows"][0]["f1"]
    hosts = sorted(shipped, key=lambda host: host != "source")  # the source first
    settings, sentences = ablation["settings"], ablation["data"]["splits"]["train"]["sentences"]
    lines = [
        *("", f"## {name}", ""),
        f"The stream with one thing changed, trained on {ablation['host']} on {sentences:,} sentences of "
        f"{ablation['data']['name']} ({settings['max_steps']} steps × {settings['per_device_train_batch_size']}), "
        f"seed {settings['seed']}; F1 on this host and zero-shot on others, and the difference from the first row.",
        *([f"The shipped space is {ablation['space']}."] if ablation.get("space") else []),
        *([f"The space hosts are {', '.join(ablation['space_hosts'])}."] if ablation.get("space_hosts") else []),
        "",
        "| | " + " | ".join(f"{host} | Δ" for host in hosts) + " |",
        "|---" * (1 + 2 * len(hosts)) + "|",
    ]
    for row in ablation["rows"]:
        cells = [f"{row['f1'][host]:.4f} | {row['f1'][host] - shipped[host]:+.4f}" for host in hosts]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return lines


def transfer_table(name: str, matrix: dict) -> list[str]:
    """A transfer matrix as Markdown lines: its picture, and one row per target."""
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
        "gap recovered",
        "calibration, s",
        "R² per knot",
    ]
    rows = []
    for target, row in matrix["targets"].items():
        fit, gap = row["calibration_r2"], row.get("gap_recovered")
        cells = [target, ", ".join(row["source_hosts"]), _figure(row["source_f1"])]
        cells += [_figure(row[f"{column['key']}_f1"]) for column in matrix["columns"]]
        cells += [_figure(row.get(f"{way}_over_own_stream"), 3) for way in ("zero_shot", "refined")]
        cells += ["–" if gap is None else f"{gap:.2f}", _figure(row["calibration_seconds"], 1)]
        rows.append([*cells, " ".join(f"{value:.2f}" for value in fit["mean"]) if fit else "–"])
    kept = [number for number in range(len(names)) if any(cells[number] != "–" for cells in rows)]
    lines = [
        *["", f"## {name}", ""],
        f"Data {matrix['data']['name']}, {metric}, seeds {', '.join(map(str, matrix['seeds']))}; a file of {size} B. "
        f"Zero-shot: no label of the target, no gradient step.{_space(matrix)}",
        "Gap recovered: (zero-shot − probe) / (own − probe), if own and probe differ by 3 points or more.",
        f"Flags of the adapters' runs: `{' '.join(matrix['flags'])}`.",
        *["", f"![Scores of one adapter file on hosts it has not seen]({name}.png)", ""],
    ]
    table = [names, ["---"] * len(names), *rows]
    return lines + ["| " + " | ".join(cells[number] for number in kept) + " |" for cells in table]


def _space(matrix: dict) -> str:
    return f" Space: {matrix['space']}." if matrix.get("space") else ""


def summary(records: dict[str, dict]) -> str:
    """The short table of README.md: the ready adapters, their size, and their score on every host."""
    ready = ready_adapters_of(records)
    if not ready:
        return "No ready adapter is recorded."
    hosts = list(dict.fromkeys(host for record in ready.values() for host in record["f1"]))
    lines = ["| adapter | scored on | file, B | " + " | ".join(hosts) + " |", "|---" * (3 + len(hosts)) + "|"]
    for name, record in ready.items():
        split = next(split for split in record["sentences"] if split != "train")
        scores = [f"{record['f1'][host][split]:.3f}" if host in record["f1"] else "–" for host in hosts]
        what = f"{split}, {record['sentences'][split]:,}"
        lines.append(" | ".join([f"| `{name}`", what, f"{record['bytes']['adapter_bytes']:,}", *scores]) + " |")
    return "\n".join(lines)


def ready_adapters_of(records: dict[str, dict]) -> dict[str, dict]:
    """Name → record of every ready adapter."""
    return {name: one for record in of_kind(records, "ready").values() for name, one in record["adapters"].items()}


def ready_table(records: dict[str, dict]) -> list[str]:
    """The ready adapters in full: every set that they were scored on, as Markdown lines."""
    rows = [
        f"| {name} | {split} | {record['sentences'][split]:,} | {host} | {score:.4f} |"
        for name, record in ready_adapters_of(records).items()
        for host, scores in record["f1"].items()
        for split, score in scores.items()
    ]
    if not rows:
        return []
    text = (
        "Trained on the first host of each by `make adapters`, seed 0; the others saw neither a label nor a step. "
        "Micro F1 of entities, or macro F1 of classes."
    )
    head = "| adapter | scored on | sentences | host | F1 |"
    return ["", "## Ready adapters", "", text, "", head, "|---|---|---|---|---|", *rows]


def _rows(records: dict[str, dict]) -> list[tuple[tuple, list[dict]]]:
    """Groups of runs that differ only in their seed, ordered by their keys."""
    rows: dict[tuple, list[dict]] = {}
    for record in records.values():
        rows.setdefault(_row_key(record), []).append(record)
    return sorted(rows.items(), key=lambda item: str(item[0]))


def _row_key(record: dict) -> tuple[str, ...]:
    settings = record["settings"]
    kind, scope = [settings["method"]], settings["train_scope"]
    if settings["method"] == "unihyperlora":
        kind += filter(None, (record["pathway"], record["projector"]))
    elif settings["method"] in ("lora", "sat_lora"):
        kind.append(f"r={settings['lora_r']}")
    if record["results"]["train_runtime"] is None:
        sources, adapter = [host["name"] for host in record["source_hosts"]], record.get("adapter")
        scope = "trained on this host" if record["host"] in sources else f"zero-shot from {', '.join(sources)}"
        if adapter is not None:
            smoothing = adapter["settings"]["label_smoothing_factor"]
            scope += f": {adapter['data']['name']}, {_length(adapter['settings'])}"
            scope += f", label smoothing {smoothing:g}" if smoothing else ""
    elif settings["method"] in BASELINE_SCOPES:
        scope = BASELINE_SCOPES[settings["method"]]
    told = ("seed", "lora_r")
    rest = sorted((name, str(value)) for name, value in settings.items() if value is not None and name not in told)
    sentences = " / ".join(f"{split['sentences']:,}" for split in record["data"]["splits"].values())
    return (f"{record['data']['name']}, {sentences}", ", ".join(kind), record["host"], scope, str(rest))


def _length(settings: dict) -> str:
    steps, batch = settings["max_steps"], settings["per_device_train_batch_size"]
    return f"{steps} × {batch}" if steps > 0 else f"{settings['num_train_epochs']:g} epochs × {batch}"


def mean_and_deviation(values: Iterable[float | None], digits: int = 4) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def cpu_seconds(runs: list[dict], which: str = "cpu_seconds") -> str:
    """Mean and deviation of CPU seconds; some early records lack the figure."""
    return mean_and_deviation((run["results"].get(which) for run in runs), digits=0)


def _figure(figure: dict | None, digits: int = 4) -> str:
    return mean_and_deviation(figure["seeds"].values() if figure else [], digits)


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
