"""Renders the tables of docs/how-to/scaling.md, and the tables of searches in results/README.md, from the records."""

from collections import Counter
from collections.abc import Callable


def scaling_page(text: str, records: dict[str, dict]) -> str:
    """docs/how-to/scaling.md with all tables rendered anew; a table without a record says "Not measured yet."."""
    drawn = {"launch": launch_table, "scaling": slope_table, "mixed_tasks": task_table, "kills": kill_table}
    return with_tables(text, records, {kind: (kind, table) for kind, table in drawn.items()})


def with_tables(text: str, records: dict[str, dict], drawn: dict[str, tuple[str, Callable]]) -> str:
    """A page whose tables are rendered anew.

    Args:
        text: the page.
        records: name → record.
        drawn: mark in the page → kind of the record, and the function that makes lines of it.
    """
    for mark, (kind, table) in drawn.items():
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        if begin not in text:
            continue
        name, record = next(((n, r) for n, r in records.items() if r.get("kind") == kind), (None, None))
        lines = ["Not measured yet."] if record is None else [f"From results/{name}.json.", "", *table(record)]
        before, rest = text.split(begin)
        text = "\n".join([before + begin, *lines, end + rest.split(end)[1]])
    return text


def launch_table(record: dict) -> list[str]:
    """Table with a row for each launch and pathway."""
    lines = ["| launch | trained | processes | exit status | time, s | largest loss difference | host tensors saved |"]
    lines.append("|---" * 7 + "|")
    for run in record["runs"]:
        cells = [run["launch"], run["pathway"]]
        if "not_run" in run:
            cells += ["–", f"not run: {run['not_run']}", "–", "–", "–"]
        else:
            off = run.get("largest_difference")
            cells += [str(run["processes"]), str(run["status"]), f"{run['seconds']:.0f}"]
            cells += ["–" if off is None else f"{off:.1e}", str(run.get("host_tensors_in_checkpoint", "–"))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def slope_table(record: dict) -> list[str]:
    """Table with the seconds and slope of each quantity, and a table of the aligned hosts."""
    lines = [f"Host {record['host']}, {record['threads']} threads, median of {record['rounds']} rounds.", ""]
    lines += ["| what | over | seconds (size) | slope |", "|---|---|---|---|"]
    for row in record["rows"]:
        pairs = zip(row["seconds"], row["sizes"], strict=True)
        told = ", ".join(f"{seconds:.3g} ({size})" for seconds, size in pairs)
        lines.append(f"| {row['what']} | {row['size']} | {told} | {row['slope']:.2f} |")
    lines += ["", "| aligned host | blocks × width | multiply-adds per token, millions | s |", "|---|---|---|---|"]
    for row in record["calibrations"]:
        shape = f"{row['blocks']} × {row['width']}"
        work = f"{row['multiply_adds_a_token'] / 1e6:.1f}"
        lines.append(f"| {row['host']} | {shape} | {work} | {row['seconds']:.1f} |")
    return lines


def task_table(record: dict) -> list[str]:
    """Table with a row for each number of tasks, and a column for each pathway and way."""
    ways = list(dict.fromkeys((row["pathway"], row["way"]) for row in record["rows"]))
    lines = [
        f"Host {record['host']}, {record['batch_size']} sentences of {record['tokens']} words, {record['threads']} "
        f"threads, a {record['reader']} reader for each task of the stream. Time relative to one task in the same "
        f"round: median of {record['rounds']} rounds (smallest – largest).",
        "",
        "| tasks | " + " | ".join(f"{pathway}, {way}" for pathway, way in ways) + " |",
        "|---" * (1 + len(ways)) + "|",
    ]
    for n in dict.fromkeys(row["tasks"] for row in record["rows"]):
        rows = {(row["pathway"], row["way"]): row for row in record["rows"] if row["tasks"] == n}
        lines.append(f"| {n:,} | " + " | ".join(_times(rows[way]) for way in ways) + " |")
    held = {row["pathway"]: row["bytes_in_memory_a_task"] for row in record["rows"]}
    told = ", ".join(f"{size:,} B ({name})" for name, size in held.items())
    return [*lines, "", f"Memory of a task with nine labels, in float32: {told}."]


def _times(row: dict) -> str:
    """A ratio, and in brackets its range and, if a mixed batch lacks some tasks, the number of tasks in it."""
    fewer = f", {row['tasks_in_the_batch']} of them" if row["tasks_in_the_batch"] < row["tasks"] else ""
    return f"{row['ratio']:.2f} ({row['least']:.2f} – {row['greatest']:.2f}{fewer})"


def kill_table(record: dict) -> list[str]:
    """Table with a row for each pathway and scope."""
    lines = ["| trained | scope | kills | stage of the kills | weights afterwards |", "|---|---|---|---|---|"]
    for run in record["runs"]:
        signals = Counter(kill["signal"] for kill in run["kills"])
        stages = Counter(kill["stage"] for kill in run["kills"])
        told = ", ".join(f"{number} × {name}" for name, number in sorted(signals.items()))
        fell = ", ".join(f"{number} × {name}" for name, number in sorted(stages.items()))
        identical = "identical" if run["identical"] else "**different**"
        lines.append(f"| {run['pathway']} | {run['scope']} | {told} | {fell} | {identical} |")
    return lines


def search_tables(searches: dict[str, dict]) -> list[str]:
    """For each search: outcomes of its trials, the best trial, and the importances of the hyperparameters."""
    lines: list[str] = []
    for name, record in searches.items():
        found, settings = record["search"], record["settings"]
        trials = {trial["number"]: trial for trial in found["trials"]}
        infeasible = sum(bool(trial["over_budget"]) for trial in trials.values())
        pruned = sum(trial["state"] == "pruned" for trial in trials.values()) - infeasible
        again = [trial["number"] for trial in trials.values() if "again" in trial]
        failed = sum(trial["state"] == "fail" for trial in trials.values())
        complete = sum(trial["state"] == "complete" for trial in trials.values())
        seconds = sum(trial["seconds"] or 0 for trial in trials.values())
        best = trials[found["best"]]
        lines += [
            *("", f"## {name}", ""),
            f"`--do_search` on {record['data']['name']}, host {record['host']}, pathway {record['pathway']}, "
            f"{settings['max_steps']} steps × {settings['per_device_train_batch_size']}: {len(trials)} trials in "
            f"{seconds / 60:.0f} minutes, {complete} with a score, {pruned} pruned, {infeasible} over budget and "
            f"not trained, {failed} killed or failed, of which {len(again)} retried when the search was resumed.",
            "",
            f"Best: trial {best['number']}, {found['metric']} {best['values'][0]:.4f}; retrained "
            f"{record['results'][found['metric']]:.4f}.",
            "",
            "| hyperparameter | best | share of the score's variance |",
            "|---|---|---|",
        ]
        for name, share in sorted(found["importances"].items(), key=lambda item: -item[1]):
            lines.append(f"| {name} | {best['params'][name]:.4g} | {share:.2f} |")
    return lines
