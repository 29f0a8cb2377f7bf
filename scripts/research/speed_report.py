"""Renders the measurements of speed.py: results/speed.md and results/speed.png."""

from pathlib import Path

from modeling_unihyperlora.storage import replacing
from scripts.research.transfer_picture import COLOURS, DPI, INK, require_matplotlib

NAMES = {
    "stream": "stream",
    "stream_delta": "stream, δθ alone",
    "inject": "injected update, k=2",
    "inject_delta": "injected update, δθ alone",
    "inject_delta_checkpointed": "injected update, δθ alone, gradient checkpointing",
    "inject_merged": "injected update, static router, merged",
    "lora": "LoRA r=8",
    "lora_no_dropout": "LoRA r=8, host without dropout",
    "lora_checkpointed": "LoRA r=8, gradient checkpointing",
    "lora_merged": "LoRA r=8, merged",
    "vblora": "VB-LoRA",
}
LINES = {"stream": COLOURS["zero_shot"], "inject": COLOURS["own_stream"], "lora": COLOURS["lora"]}
COMMANDS = "latency parts many start slopes train memory calibrate size".split()


def write(records: dict[str, dict], folder: Path) -> None:
    """Write speed.md, and speed.png if there are records of ``latency``.

    Args:
        records: name → record, of kind "speed".
        folder: output folder.
    """
    ordered = sorted(records.items(), key=lambda item: (COMMANDS.index(item[1]["what"]), item[0]))
    lines = [
        "# What an adapter costs",
        "",
        "Written by `python -m scripts.research.benchmark render` from `speed-*.json` beside this page; `make bench`",
        "measures anew. Contenders run in turns in one process. Ratios compare a contender with the first one in the",
        "same turn: median over the turns, quartiles in brackets.",
    ]
    drawn = [record for _, record in ordered if record["what"] == "latency"]
    if not drawn:
        (folder / "speed.png").unlink(missing_ok=True)
    if drawn:
        draw(drawn, folder / "speed.png")
        lines += ["", "![Time of a forward pass over that of the bare host, by length](speed.png)"]
    for name, record in ordered:
        host, threads = record["host"], record["threads"]
        where = (
            f"{record['device']}, {threads} thread{'s' * (threads > 1)}"
            if record["device"] == "cpu"
            else record["device"]
        )
        lines += ["", f"## {name}", ""]
        lines += [
            f"`benchmark.py {record['what']}` on {host['name']} ({host['num_layers']} blocks × {host['hidden_size']})"
            f", {where}, torch {record['versions']['torch']}, PEFT {record['versions']['peft']}; "
            f"{'a trained' if record['trained_adapter'] else 'a fresh'} adapter.",
            "",
        ]
        lines += TABLES[record["what"]](record)
    if not any(record["device"] != "cpu" for record in records.values()):
        lines += ["", "On a GPU: not measured."]
    with replacing(folder / "speed.md") as temporary:
        Path(temporary).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _ratio(figures: dict, key: str = "ratio", spread: str = "quartiles") -> str:
    low, high = figures[spread]
    return f"{figures[key]:.3f} [{low:.3f}, {high:.3f}]"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def _race(record: dict) -> list[str]:
    cells = [cell for cell in record["cells"] if "left_out" not in cell]
    names = [name for name in NAMES if any(name in cell for cell in cells)]
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell["tokens"] or 0, cell["batch"])):
        shape = f"{cell['batch']} × {cell['tokens'] or 'sentences as they are'}"
        rows.append([shape, *(_ratio(cell[name]) for name in names), f"{cell['first_ms']:.1f}", str(cell["rounds"])])
    base = "bare host" if record["first"] == "host" else NAMES[record["first"]]
    lines = _table(["batch × tokens", *(NAMES[name] for name in names), f"{base}, ms", "turns"], rows)
    if left := [cell for cell in record["cells"] if "left_out" in cell]:
        shapes = ", ".join(f"{cell['batch']} × {cell['tokens']}" for cell in left)
        lines += ["", f"Left out: {shapes} ({left[0]['left_out']})."]
    if record["first"] == "lora":
        lines += ["", "The ratio of steps is also that of epochs, which have the same number of steps for all. The"]
        lines += ["stream's states are computed once, before."]
    return lines


PARTS = {
    "host_with_states": "host, returning its states",
    "places": "where the words are",
    "linear_map": "map, linear",
    "query": "map, query of the landmarks",
    "landmarks": "map, landmarks",
    "reader": "reader",
    "head": "head",
}


def _parts(record: dict) -> list[str]:
    cells, adds = record["cells"], record["multiply_adds_pct_at_128_tokens"]
    shapes = [f"{cell['batch']} × {cell['tokens']}" for cell in cells]
    rows = [["whole stream", *(_ratio(cell["stream"]) for cell in cells), f"{100 + sum(adds.values()):.2f}"]]
    for name, text in PARTS.items():
        if name not in cells[0]:  # a linear map has no landmarks
            continue
        added = f"{adds[name]:.2f}" if name in adds else "–"
        rows.append([text, *(_ratio(cell[name]) for cell in cells), added])
    lines = [
        "Time of a part over that of the bare host. A part runs alone, with its weights in the processor's cache."
    ]
    header = ["part", *(f"{shape}, time / host" for shape in shapes), "multiply-adds, % of the host's at 128 tokens"]
    if "landmarks" not in cells[0]:
        lines.append("This host's map is linear: landmarks would not fit the space better. Most hosts have them too.")
    return [*lines, "", *_table(header, rows)]


WAYS = {
    "one_pass": "stream, tasks for every sentence: {}",
    "mixed": "stream, tasks of which each sentence has one: {}",
    "lora_merged_passes": "LoRA r=8, merged, passes: {}",
    "lora_passes": "LoRA r=8, passes: {}",
    "lora_mixed": "LoRA r=8 (PEFT), adapters of which each sentence has one: {}",
}


def _many(record: dict) -> list[str]:
    shape = f"{record['batch']} sentences of {record['tokens']} tokens, readers of size {record['reader']}"
    found = [
        (*name.rpartition("_")[::2], figures) for name, figures in record.items() if name.rpartition("_")[0] in WAYS
    ]
    found.sort(key=lambda row: ([*WAYS].index(row[0]), int(row[1])))
    rows = [[WAYS[way].format(number), _ratio(figures)] for way, number, figures in found]
    lines = [f"{shape}; {record['rounds']} turns, {record['first_ms']:.0f} ms of the bare host each.", ""]
    return [*lines, *_table(["way", "time / bare host"], rows)]


def _start(record: dict) -> list[str]:
    rows = [
        [name, f"{record[key]['cpu_seconds']:.2f}", f"{record[key]['peak_mb']:.0f}"]
        for key, name in (("torch", "torch"), ("onnx", "ONNX files, without torch"))
    ]
    lines = _table(["`unihyperlora tag` on one sentence", "CPU seconds of the process", "peak MB"], rows)
    equal = "the same entities" if record["equal_entities"] else "**other entities**"
    sizes = f"The host's file has {record['host_bytes']:,} bytes, the reader's {record['reader_bytes']:,}"
    return [
        *lines,
        "",
        f"{sizes}; both find {equal}. Median of {record['rounds']} processes, the host lined up before.",
    ]


def _slopes(record: dict) -> list[str]:
    lines = [
        f"Time that the adapter adds to a host with random weights, batch {record['batch']}, as a power of the varied",
        "size. If the exponent is at most the host's, the overhead grows no faster than the host's time.",
        "",
    ]
    rows = []
    for varied, curve in record["curves"].items():
        points = [point for point in curve["points"] if "left_out" not in point]
        span = ", ".join(str(point[varied]) for point in points)
        powers = curve["exponents"]
        cells = [f"{powers[name]:.2f}" if powers[name] is not None else "–" for name in ("host", "stream", "inject")]
        ratios = [" ".join(f"{point[name]['ratio']:.3f}" for point in points) for name in ("stream", "inject")]
        rows.append([varied, span, *cells, *ratios])
    header = ["varied", "values", "host", "stream", "injected", "stream / host", "injected / host"]
    return lines + _table(header, rows)


def _memory(record: dict) -> list[str]:
    rows = []
    for name in [name for name in NAMES if name in record]:
        own = record[name]
        rows.append(
            [
                NAMES[name],
                _ratio(own, "peak_ratio", "peak_ratio_range"),
                f"{own['peak_mb']:.0f}",
                _ratio(own, "peak_over_loaded_ratio", "peak_over_loaded_ratio_range"),
                f"{own['peak_over_loaded_mb']:.0f}",
            ]
        )
    lines = _table(
        ["training", "peak / LoRA [range]", "MB", "peak above the loaded host / LoRA [range]", "MB"],
        rows,
    )
    text = f"{record['batch']} windows of {record['tokens']} tokens, {record['rounds']} fresh processes each."
    return [*lines, "", text]


def _calibrate(record: dict) -> list[str]:
    rows = []
    for name, base, text in (
        ("calibrate", "host_on_anchors", "align a new host / the bare host on the anchors"),
        ("load_adapter", "load_host", "load the adapter on a warm host, calibration cached / load the host"),
    ):
        own = record[name]
        ratio = _ratio(own, f"ratio_to_{base}", "ratio_quartiles")
        rows.append([text, ratio, f"{own['seconds']:.3f}", f"{record[base]['seconds']:.3f}"])
    return _table(["what", "ratio", "s", "of which the second, s"], rows)


def _size(record: dict) -> list[str]:
    rows = []
    for name in ("stream", "inject", "lora"):
        own = record[name]
        share = f"{own['bytes_over_lora']:.3f}" if "bytes_over_lora" in own else "1"
        adds = ", ".join(f"{value:.2f} % at {tokens}" for tokens, value in own["flops_overhead_pct_by_tokens"].items())
        rows.append([NAMES[name], f"{own['bytes']:,}", share, adds])
    lines = _table(["adapter", "bytes", "over LoRA's", "extra multiply-adds, tokens"], rows)
    for name in ("stream", "inject"):
        parts = ", ".join(f"{part} {size:,}" for part, size in sorted(record[name].get("bytes_by_part", {}).items()))
        lines += ["", f"Bytes of the {NAMES[name]}: {parts}."] if parts else []
    readers = ", ".join(f"{name} {size:,}" for name, size in record.get("reader_bytes", {}).items())
    return [*lines, "", f"Bytes of a task's reader by its size: {readers}."] if readers else lines


TABLES = {
    "latency": _race,
    "parts": _parts,
    "many": _many,
    "start": _start,
    "slopes": _slopes,
    "train": _race,
    "memory": _memory,
    "calibrate": _calibrate,
    "size": _size,
}


def draw(records: list[dict], path: Path) -> None:
    """Draw the ratio to the bare host against length at batch 8, one panel per host; bars are the quartiles.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(records), 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, record in zip(panels, records, strict=True):
        cells = [cell for cell in record["cells"] if cell["batch"] == 8 and "left_out" not in cell]
        cells.sort(key=lambda cell: cell["tokens"])
        tokens = [cell["tokens"] for cell in cells]
        for name, colour in LINES.items():
            if not all(name in cell for cell in cells):
                continue
            ratios = [cell[name]["ratio"] for cell in cells]
            low = [max(0.0, cell[name]["ratio"] - cell[name]["quartiles"][0]) for cell in cells]
            high = [max(0.0, cell[name]["quartiles"][1] - cell[name]["ratio"]) for cell in cells]
            axes.errorbar(tokens, ratios, yerr=[low, high], color=colour, marker="o", capsize=3, label=NAMES[name])
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(value) for value in tokens])
        axes.set_xlabel("tokens of a sentence, batch 8")
        axes.set_title(f"{record['host']['name']}, {record['device']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time of a forward pass / bare host")
    panels[0].legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
