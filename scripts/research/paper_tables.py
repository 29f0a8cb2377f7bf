"""Renders the paper's comparison as Markdown from the records of its runs: scores, costs, the paper's expectations."""

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

PICTURE = "paper-pareto.png"
SOURCE = "unihyperlora-source"  # the method that trains a task for all hosts
METHODS = {  # method of a run config → name in the table, in the order of the rows
    SOURCE: "unihyperlora, source training",
    "unihyperlora-task": "unihyperlora, medium reader of this host",
    "unihyperlora-task-small": "unihyperlora, small reader of this host",
    "unihyperlora-cost": "unihyperlora, medium reader of this host, LoRA's cost",
    "unihyperlora-cost-small": "unihyperlora, small reader of this host, LoRA's cost",
    "unihyperlora": "unihyperlora, δθ 500 steps",
    "unihyperlora-refined": "unihyperlora, δθ 500 steps on a refined map",
    "sat_lora": "SAT-LoRA",
    "lora": "LoRA r=8",
    "lora-r1": "LoRA r=1",
    "full": "full fine-tuning",
    "probe": "probe",
}
OURS = "unihyperlora, "
TUNED = ("unihyperlora", "unihyperlora-refined")  # methods that tune δθ
OWN = ("unihyperlora-task", "unihyperlora-task-small")  # readers that are trained on each host
COST = ("unihyperlora-cost", "unihyperlora-cost-small")  # the same, with steps for the cost of LoRA's training
RIVAL = "sat_lora"
COLUMNS = (
    *("data", "host", "method", "seeds", "steps", "rate", "score", "accuracy", "before tuning"),
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
MANY = 10  # tasks and hosts, for the bytes that they need in all
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
        if self.method in (*OWN, *COST):
            return {"for one more task": self.task_bytes(), "whole file": file}
        return {"": file if self.method in (SOURCE, "sat_lora") else file + head}  # these files include the head

    def task_bytes(self) -> float:
        """Bytes that the task adds to a file that has the space already: reader, head and δθ."""
        return sum(self.mean(name) or 0 for name in ("reader_bytes", "head_bytes", "delta_bytes"))

    def bytes_in_all(self, with_delta: bool = True) -> float:
        """Bytes to store for ``MANY`` tasks on ``MANY`` hosts.

        A task that is trained once has one reader and head for all hosts, and δθ for each host if ``with_delta``. The
        readers of ``OWN`` and ``COST``, and the other methods' weights, are stored for each task and host.
        """
        pairs, file = MANY * MANY, self.mean("adapter_bytes") or 0
        if self.method in (SOURCE, *TUNED, *OWN, *COST):
            trained = MANY if self.method in (SOURCE, *TUNED) else pairs
            further = (pairs - trained) * (self.mean("delta_bytes") or 0) if self.method in TUNED and with_delta else 0
            return file + (trained - 1) * self.task_bytes() + further
        return pairs * self.stored()[""]


def rows_of(records: Iterable[dict]) -> list[Row]:
    """Rows from the records of ``benchmark.py paper``, ordered by data, host and method; sources come first."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        method, data = record["run_config"].split("-iter1-")
        groups.setdefault((method, data, record["host"]), []).append(record)
    rows = [Row(*key, tuple(runs)) for key, runs in groups.items()]
    known = list(METHODS)
    return sorted(rows, key=lambda row: (row.method != known[0], row.data, row.host, known.index(row.method)))


class Verdict(NamedTuple):
    """An expectation, how many of its rows held, and the Markdown of the rows."""

    title: str
    held: int
    of: int
    lines: list[str]

    @property
    def word(self) -> str:
        return "Held" if self.held == self.of else "Did not hold" if self.held == 0 else "Held in part"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The paper's expectations, and our own."""
    first = (zero_shot(rows), against_sat_lora(rows), at_equal_steps(rows), at_equal_cost(rows))
    return [*first, *memory(rows), against_lora(rows)]


def paper_summary(records: list[dict]) -> list[str]:
    """The comparison for a reader in a hurry: scores, a picture, and how many rows of each expectation held."""
    rows = rows_of(records)
    if not rows:
        return []
    lines = [
        "F1 of entities, or macro F1; the best of a line is bold. A method had 500 steps of 32 on this host's labels,",
        "unless its name says otherwise.",
        *overview(rows),
        *("", "| expected | held |", "|---|---|"),
    ]
    lines += [f"| {v.title} | {v.held} of {v.of} |" for v in verdicts(rows) if v.of]
    return [*lines, "", f"![Score against the bytes of {MANY} tasks on {MANY} hosts]({PICTURE})"]


def paper_page(records: list[dict], trials: list[dict]) -> list[str]:
    """The whole comparison: table, expectations, and the learning rates that were tried.

    Args:
        records: records of kind "paper".
        trials: records of kind "paper_rate", with other learning rates.
    """
    rows = rows_of(records)
    if not rows:
        return []
    lines = [
        *("# The paper's comparison", ""),
        "From the runs in `paper.jsonl`, by `python -m scripts.research.benchmark paper` over methods and data sets.",
        "Batches, data and their order are the same for all methods; steps and learning rate are in the row. Other",
        "rates that were tried are listed below.",
        "Score: F1 of entities, or macro F1. *Before tuning* is the score of the source's file on the host, without",
        "labels of the host; a refined map also uses the training text without its labels, as read by the source's",
        "host. The file includes reader, head and δθ. Training is wall-clock time on a possibly shared machine. CPU",
        "is the time of all threads of the run's process, from its start to the last score.",
        "A stream's states are computed once per host and data set, and count in the CPU time of the first run there.",
        "A run's record says which data, and how many sentences, it read.",
        "",
        *("| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"),
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    for verdict in verdicts(rows):
        lines += verdict.lines
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
        f"{settings['max_steps']:,}",
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


def overview(rows: list[Row]) -> list[str]:
    """A short table of scores, one line for each data set and host; the best of each line is bold."""
    shown = {
        "trained on another host, zero-shot": ("unihyperlora", "zero_shot_f1"),
        "with 500 steps of δθ": ("unihyperlora", "eval_f1"),
        "reader of this host, 500 steps": ("unihyperlora-task", "eval_f1"),
        "reader of this host, LoRA's cost": ("unihyperlora-cost", "eval_f1"),
        **{METHODS[method]: (method, "eval_f1") for method in (RIVAL, "lora", "full", "probe")},
    }
    sources = {(row.data, row.host) for row in rows if row.method == SOURCE}
    lines = ["", "| data | host | " + " | ".join(shown) + " |", "|---" * (2 + len(shown)) + "|"]
    for data, host in sorted({(row.data, row.host) for row in rows if row.method != SOURCE}):
        here = {row.method: row for row in rows if (row.data, row.host) == (data, host)}
        values = [here[method].mean(figure) if method in here else None for method, figure in shown.values()]
        if (data, host) in sources:  # the source's own host: nothing was moved
            values[0] = None
        best = max((value for value in values if value is not None), default=None)
        cells = ["–" if value is None else f"{value:.4f}" for value in values]
        cells = [f"**{cell}**" if value == best else cell for value, cell in zip(values, cells, strict=True)]
        lines.append(f"| {data} | {host} | " + " | ".join(cells) + " |")
    return lines


# ---- the paper's expectations ----


def zero_shot(rows: list[Row]) -> Verdict:
    """Zero-shot, before tuning: within 1 % of the score of the same task's source on its own host."""
    sources = {row.data: row for row in rows if row.method == SOURCE}
    moved = [row for row in rows if row.method in TUNED and row.data in sources and row.values("zero_shot_f1")]

    def compare(row: Row) -> tuple[bool, list[str]]:
        source = sources[row.data]
        ours, its = row.mean("zero_shot_f1"), source.mean("eval_f1")
        cells = [f"{ours:.4f}", f"{its:.4f} ({source.host})", f"{100 * (ours / its - 1):+.1f} %"]
        return ours >= (1 - WITHIN) * its, cells

    moved = [row for row in moved if row.host != sources[row.data].host]
    return _verdict("Zero-shot within 1 % of the source", moved, ["zero-shot", "source", "difference"], compare)


def against_sat_lora(rows: list[Row]) -> Verdict:
    """δθ after 500 steps: at least equal to SAT-LoRA trained on this host."""
    return _against_rival(rows, "δθ after 500 steps at least equal to SAT-LoRA retrained", TUNED)


def at_equal_steps(rows: list[Row]) -> Verdict:
    """A reader that is trained on this host for as many steps: at least equal to SAT-LoRA trained on this host."""
    return _against_rival(rows, "A reader of this host at least equal to SAT-LoRA, at equal steps", OWN)


def _against_rival(rows: list[Row], title: str, methods: tuple[str, ...]) -> Verdict:
    compare = functools.partial(_beside_rival, rows)
    return _verdict(title, _with_rival(rows, methods), ["ours", "SAT-LoRA", "difference"], compare)


def _beside_rival(rows: list[Row], row: Row) -> tuple[bool, list[str]]:
    """Whether a row's score is at least SAT-LoRA's on its data and host, and the cells that say so."""
    ours, its = row.mean("eval_f1"), _beside(rows, row, RIVAL).mean("eval_f1")
    return ours >= its, [f"{ours:.4f}", f"{its:.4f}", f"{100 * (ours - its):+.1f} points"]


def at_equal_cost(rows: list[Row]) -> Verdict:
    """A reader that is trained on this host for no more CPU seconds than LoRA r=8: at least equal to SAT-LoRA.

    The time for the host's states counts in every row, though only the first of these runs on a host and data set
    computes them. LoRA's is its cheapest run, since some were made on a slower machine.
    """

    def compare(row: Row) -> tuple[bool, list[str]]:
        holds, cells = _beside_rival(rows, row)
        same = [_beside(rows, row, method) for method in COST]
        states = max(second for other in same if other for second in (0, *other.values("host_cpu_seconds")))
        cost = row.mean("cpu_seconds") - (row.mean("host_cpu_seconds") or 0) + states
        cost /= min(_beside(rows, row, "lora").values("cpu_seconds"))
        return holds and cost <= 1, [*cells, f"{cost:.2f}"]

    def is_costed(row: Row | None) -> bool:
        return row is not None and bool(row.values("cpu_seconds"))

    own = _with_rival(rows, COST)
    costed = [row for row in own if is_costed(row) and is_costed(_beside(rows, row, "lora"))]
    title = "A reader of this host at least equal to SAT-LoRA, for no more CPU seconds than LoRA r=8"
    return _verdict(title, costed, ["ours", "SAT-LoRA", "difference", "CPU / LoRA's"], compare)


def memory(rows: list[Row]) -> list[Verdict]:
    """97 % less memory than SAT-LoRA, for each way of counting."""
    found = []
    counts: list[tuple[str, Callable[[Row], float], Callable[[Row], float]]] = [
        ("stored for one more host (δθ)", lambda r: r.stored()["for one more host"], _file),
        ("stored for one more task (reader, head and δθ)", Row.task_bytes, _file),
        (f"stored for {MANY} tasks on {MANY} hosts", Row.bytes_in_all, Row.bytes_in_all),
        ("the whole file", _file, _file),
        ("extra RAM, bytes", lambda r: 1e6 * r.mean("extra_ram_mb"), lambda r: 1e6 * r.mean("extra_ram_mb")),
    ]
    for name, count, its_count in counts:

        def compare(row: Row, count=count, its_count=its_count) -> tuple[bool, list[str]]:
            ours, its = count(row), its_count(_beside(rows, row, RIVAL))
            cells = [f"{ours:,.0f}", f"{its:,.0f}", f"{100 * (ours / its - 1):+.1f} %"]
            return ours <= (1 - LESS_MEMORY) * its, cells

        title = f"97 % less memory than SAT-LoRA: {name}"
        found.append(_verdict(title, _with_rival(rows, TUNED), ["ours", "SAT-LoRA", "difference"], compare))
    return found


def against_lora(rows: list[Row]) -> Verdict:
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
    return _verdict(title, [row for row in tuned if rivals(row)], ["δθ", "best LoRA", "difference"], compare)


def _verdict(title: str, rows: list[Row], heads: list[str], compare: Callable) -> Verdict:
    """An expectation with the number of rows in which it held, and the difference in each."""
    compared = [(row, *compare(row)) for row in rows]
    verdict = Verdict(title, sum(holds for _, holds, _ in compared), len(rows), ["", f"### {title}", ""])
    if not rows:
        verdict.lines.append("Not tested yet: the necessary runs are missing.")
        return verdict
    columns = ["data", "host", "method", "seeds", *heads, ""]
    lines = [f"**{verdict.word}**: in {verdict.held} of {verdict.of}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row, holds, cells in compared:
        seeds = ", ".join(map(str, row.seeds()))
        cells = [row.data, row.host, METHODS[row.method].removeprefix(OURS), seeds, *cells]
        cells.append("held" if holds else "did not hold")
        lines.append("| " + " | ".join(cells) + " |")
    verdict.lines.extend(lines)
    return verdict


def _with_rival(rows: list[Row], methods: tuple[str, ...]) -> list[Row]:
    return [row for row in rows if row.method in methods and _beside(rows, row, RIVAL)]


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
