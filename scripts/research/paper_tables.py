"""Renders the paper's comparison as Markdown from the records of its runs: scores, costs, the paper's expectations."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PICTURE = "paper-pareto.png"
SOURCE = "unihyperlora-source"  # the method that trains a task for all hosts
METHODS = {  # method of a run config → name in the table, in the order of the rows
    SOURCE: "unihyperlora, source training",
    "unihyperlora-task": "unihyperlora, a reader of this host's own",
    "unihyperlora": "unihyperlora, δθ 500 steps",
    "unihyperlora-refined": "unihyperlora, δθ 500 steps on a refined map",
    "sat_lora": "SAT-LoRA",
    "lora": "LoRA r=8",
    "lora-r1": "LoRA r=1",
    "full": "full fine-tuning",
    "probe": "probe",
}
TUNED = {  # method → the map that its δθ changes
    "unihyperlora": "line-up",
    "unihyperlora-refined": "refined",
}
COLUMNS = (
    *("data", "host", "method", "seeds", "rate", "score", "accuracy", "before tuning"),
    *("file, B", "reader, B", "head, B", "δθ, B"),
    *(
        "extra RAM, MB",
        "extra multiply-adds",
        "atoms a token",
        "trainable",
        "training, s",
        "CPU, s",
        "peak memory, MB",
    ),
)
WITHIN, LESS_MEMORY, MORE_THAN_LORA = 0.01, 0.97, 0.011  # thresholds of the paper's expectations


@dataclass(frozen=True)
class Row:
    """The runs of one config on one host; they differ only in their seed."""

    method: str
    data: str
    host: str
    runs: tuple[dict, ...]

    def values(self, figure: str) -> list[float]:
        return [run["results"][figure] for run in self.runs if run["results"].get(figure) is not None]

    def mean(self, figure: str) -> float | None:
        values = self.values(figure)
        return statistics.mean(values) if values else None

    def seeds(self) -> list[int]:
        return sorted(run["settings"]["seed"] for run in self.runs)

    def is_tags(self) -> bool:
        return "eval_precision" in self.runs[0]["results"]

    def stored(self) -> dict[str, float]:
        """Way of counting → bytes to store for this host and task; the weights of other methods count as float32.

        One more host needs only δθ: space, reader and head serve all hosts.
        """
        file, head, delta = (self.mean(name) or 0 for name in ("adapter_bytes", "head_bytes", "delta_bytes"))
        if self.method in TUNED:
            return {"for one more host": delta, "whole file": file}
        if self.method == "unihyperlora-task":
            return {"for one more task": self.task_bytes(), "whole file": file}
        return {"": file if self.method in (SOURCE, "sat_lora") else file + head}  # these files include the head

    def task_bytes(self) -> float:
        """Bytes that the task adds to a file that has the space already: reader, head and δθ."""
        return sum(self.mean(name) or 0 for name in ("reader_bytes", "head_bytes", "delta_bytes"))


def rows_of(records: Iterable[dict]) -> list[Row]:
    """Rows from the records of ``benchmark.py paper``, ordered by data, host and method; sources come first."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        method, data = record["run_config"].split("-iter1-")
        groups.setdefault((method, data, record["host"]), []).append(record)
    rows = [Row(*key, tuple(runs)) for key, runs in groups.items()]
    known = list(METHODS)
    return sorted(rows, key=lambda row: (row.method != known[0], row.data, row.host, known.index(row.method)))


def paper_page(records: list[dict], trials: list[dict]) -> list[str]:
    """The whole comparison: table, picture, expectations, and the learning rates that were tried.

    Args:
        records: records of kind "paper".
        trials: records of kind "paper_rate", with other learning rates.
    """
    rows = rows_of(records)
    if not rows:
        return []
    lines = [
        *("", "## The paper's comparison", ""),
        "From the runs in `paper.jsonl`, by `python -m scripts.research.benchmark paper` over methods and data sets.",
        "All methods have the same steps, batches and data order; the learning rate is in the row. Other rates that",
        "were tried are listed below.",
        "Score: F1 of entities, or macro F1. *Before tuning* is the score of the source's file on the host, without",
        "labels of the host; a refined map also uses the training text without its labels, as read by the source's",
        "host. The file includes reader, head and δθ. Training is wall-clock time on a possibly shared machine. CPU",
        "is the time of all threads of the run's process, from its start to the last score.",
        "A stream's states are computed once per host and data set, and count in the CPU time of the first run there.",
        "Pages of their file count in its peak memory, although the system may drop them. A run's record says which",
        "data, and how many sentences, it read.",
        *("", f"![Score against stored bytes]({PICTURE})", ""),
        *("| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"),
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    for expectation in (zero_shot, against_sat_lora, memory, against_lora):
        lines += expectation(rows)
    return lines + rates(rows, trials)


def _cells(row: Row) -> list[str]:
    first, settings = row.runs[0]["results"], row.runs[0]["settings"]
    overhead = first["flops_overhead_pct"]
    whole = ("adapter_bytes", "reader_bytes", "head_bytes", "delta_bytes")
    return [
        row.data,
        row.host,
        METHODS[row.method],
        ", ".join(map(str, row.seeds())),
        f"{settings['learning_rate']:g}",
        _spread(row.values("eval_f1")),
        "–" if row.is_tags() else _spread(row.values("eval_accuracy")),
        _spread(row.values("zero_shot_f1")),
        *("–" if first.get(name) is None else f"{first[name]:,}" for name in whole),
        "–" if first["extra_ram_mb"] is None else f"{first['extra_ram_mb']:.2f}",
        "–" if overhead is None else f"{overhead:.2f} %",
        _spread(row.values("active_atoms_per_token"), 2),
        f"{first['trainable_parameters']:,}",
        _spread(row.values("train_runtime"), 0),
        _spread(row.values("cpu_seconds"), 0),
        _spread(row.values("peak_memory_mb"), 0),
    ]


# ---- the paper's expectations ----


def zero_shot(rows: list[Row]) -> list[str]:
    """Zero-shot, before tuning: within 1 % of the score of the same task's source on its own host."""
    sources = {row.data: row for row in rows if row.method == SOURCE}
    moved = [row for row in rows if row.method in TUNED and row.data in sources and row.values("zero_shot_f1")]

    def compare(row: Row) -> tuple[bool, list[str]]:
        source = sources[row.data]
        ours, its = row.mean("zero_shot_f1"), source.mean("eval_f1")
        cells = [f"{ours:.4f}", f"{its:.4f} ({source.host})", f"{100 * (ours / its - 1):+.1f} %"]
        return ours >= (1 - WITHIN) * its, cells

    moved = [row for row in moved if row.host != sources[row.data].host]
    return _verdicts("Zero-shot within 1 % of the source", moved, ["zero-shot", "source", "difference"], compare)


def against_sat_lora(rows: list[Row]) -> list[str]:
    """δθ after 500 steps: at least equal to SAT-LoRA trained on this host."""

    def compare(row: Row) -> tuple[bool, list[str]]:
        ours, its = row.mean("eval_f1"), _beside(rows, row, "sat_lora").mean("eval_f1")
        return ours >= its, [f"{ours:.4f}", f"{its:.4f}", f"{100 * (ours - its):+.1f} points"]

    heads = ["δθ", "SAT-LoRA", "difference"]
    title = "δθ after 500 steps at least equal to SAT-LoRA retrained"
    return _verdicts(title, _tuned_beside(rows, "sat_lora"), heads, compare)


def memory(rows: list[Row]) -> list[str]:
    """97 % less memory than SAT-LoRA, for each way of counting."""
    lines = []
    counts: list[tuple[str, Callable[[Row], float], Callable[[Row], float]]] = [
        ("stored for one more host (δθ)", lambda r: r.stored()["for one more host"], _file),
        ("stored for one more task (reader, head and δθ)", Row.task_bytes, _file),
        ("the whole file", _file, _file),
        ("extra RAM, bytes", lambda r: 1e6 * r.mean("extra_ram_mb"), lambda r: 1e6 * r.mean("extra_ram_mb")),
    ]
    for name, count, its_count in counts:

        def compare(row: Row, count=count, its_count=its_count) -> tuple[bool, list[str]]:
            ours, its = count(row), its_count(_beside(rows, row, "sat_lora"))
            cells = [f"{ours:,.0f}", f"{its:,.0f}", f"{100 * (ours / its - 1):+.1f} %"]
            return ours <= (1 - LESS_MEMORY) * its, cells

        title = f"97 % less memory than SAT-LoRA: {name}"
        lines += _verdicts(title, _tuned_beside(rows, "sat_lora"), ["ours", "SAT-LoRA", "difference"], compare)
    return lines


def against_lora(rows: list[Row]) -> list[str]:
    """1.1 % better than the best LoRA whose file is not larger, on the smallest host."""
    sizes = {row.host: row.mean("trainable_parameters") for row in rows if row.method == "full"}
    smallest = min(sizes, key=sizes.get) if sizes else None
    tuned = [row for row in rows if row.method in TUNED and row.host == smallest]

    def rivals(row: Row) -> list[Row]:
        beside = [_beside(rows, row, method) for method in ("lora", "lora-r1")]
        return [other for other in beside if other and other.stored()[""] <= row.stored()["whole file"]]

    def compare(row: Row) -> tuple[bool, list[str]]:
        best = max(rivals(row), key=lambda other: other.mean("eval_f1"))
        ours, its = row.mean("eval_f1"), best.mean("eval_f1")
        cells = [f"{ours:.4f}", f"{its:.4f} ({METHODS[best.method]})", f"{100 * (ours / its - 1):+.1f} %"]
        return ours >= (1 + MORE_THAN_LORA) * its, cells

    title = "+1.1 % over plain LoRA whose file is no larger, on the smallest host"
    return _verdicts(title, [row for row in tuned if rivals(row)], ["δθ", "best LoRA", "difference"], compare)


def _verdicts(title: str, rows: list[Row], heads: list[str], compare: Callable) -> list[str]:
    """Markdown of an expectation: the number of rows in which it held, and the difference in each."""
    if not rows:
        return ["", f"### {title}", "", "Not tested yet: the necessary runs are missing."]
    compared = [(row, *compare(row)) for row in rows]
    held = sum(holds for _, holds, _ in compared)
    word = "Held" if held == len(rows) else "Did not hold" if held == 0 else "Held in part"
    columns = ["data", "host", "map", "seeds", *heads, ""]
    lines = ["", f"### {title}", "", f"**{word}**: in {held} of {len(rows)}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row, holds, cells in compared:
        seeds = ", ".join(map(str, row.seeds()))
        cells = [row.data, row.host, TUNED[row.method], seeds, *cells, "held" if holds else "did not hold"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _tuned_beside(rows: list[Row], other: str) -> list[Row]:
    return [row for row in rows if row.method in TUNED and _beside(rows, row, other)]


def _beside(rows: list[Row], row: Row, method: str) -> Row | None:
    """Row of another method with the same data and host; None if there is none."""
    found = (other for other in rows if (other.method, other.data, other.host) == (method, row.data, row.host))
    return next(found, None)


def _file(row: Row) -> float:
    return row.mean("adapter_bytes")


# ---- the learning rates that were tried ----


def rates(rows: list[Row], trials: list[dict]) -> list[str]:
    """Table of scores by learning rate, one seed each; the config's own rate is bold."""
    tried: dict[tuple[str, str, str], dict[float, float]] = {}
    for record in trials:
        method, data = record["run_config"].split("-iter1-")
        key = (method, data, record["host"])
        tried.setdefault(key, {})[_rate(record)] = record["results"]["eval_f1"]
    if not tried:
        return []
    lines = [
        *("", "### Rates that were tried", ""),
        "One seed each, the config's own rate in bold. A config has one rate, whatever the host.",
        *("", "| method | data | host | score by rate |", "|---|---|---|---|"),
    ]
    for (method, data, host), scores in sorted(tried.items(), key=lambda item: item[0]):
        own = next((row for row in rows if (row.method, row.data, row.host) == (method, data, host)), None)
        chosen = None
        if own is not None:
            first = min(own.runs, key=lambda run: run["settings"]["seed"])
            chosen = _rate(first)
            scores.setdefault(chosen, first["results"]["eval_f1"])
        cells = [f"{rate:g}: {scores[rate]:.4f}" for rate in sorted(scores)]
        cells = [f"**{cell}**" if rate == chosen else cell for rate, cell in zip(sorted(scores), cells, strict=True)]
        lines.append(f"| {METHODS[method]} | {data} | {host} | {', '.join(cells)} |")
    return lines


def _rate(record: dict) -> float:
    return record["settings"]["learning_rate"]


def _spread(values: list[float], digits: int = 4) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"
