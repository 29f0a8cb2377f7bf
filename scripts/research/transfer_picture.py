"""Draws a transfer matrix: zero-shot scores on unseen hosts, beside the scores of training on those hosts."""

import importlib.util
import itertools
import textwrap
from pathlib import Path

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.storage import replacing

# Okabe and Ito's palette, which is readable with any colour vision.
COLOURS = {
    "zero_shot": "#0072B2",
    "refined": "#0072B2",
    "own_stream": "#D55E00",
    "lora": "#E69F00",
    "delta": "#56B4E9",
    "probe": "#009E73",
}
MARKS = {
    "refined": "P",
    "own_stream": "D",
    "lora": "^",
    "delta": "o",
    "probe": "s",
    "shuffled": "X",
    "random_map": "X",
}
CONTROL_COLOUR = "#8C8C8C"
INK = "#222222"
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind text that the dashed line may cross
BAR, LANE, GAP = 1.5, 0.78, 0.9  # heights: the zero-shot bar, a line below it, the space between two hosts
INCHES_A_UNIT, FRAME = 0.205, 1.5
RIGHT_EDGE = 1.36  # leaves room for the text beside a mark at 1
ROOM_INSIDE = 0.35  # shorter bars have their number outside
WIDTH, DPI = 9.0, 100


def require_matplotlib() -> None:
    """Raise ``ConfigError`` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("The picture needs matplotlib, which is not installed: pip install 'unihyperlora[plots]'.")


def draw(matrix: dict[str, object], path: str | Path) -> None:
    """Draw ``transfer_matrix.json`` as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
        AdapterFileError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = [(name, row, _lanes(matrix, row)) for name, row in matrix["targets"].items()]
    tops = list(itertools.accumulate((BAR + LANE * len(lanes) + GAP for *_, lanes in blocks), initial=0.0))
    figure = Figure(figsize=(WIDTH, FRAME + INCHES_A_UNIT * tops[-1]), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for (name, row, lanes), (top, next_top) in zip(blocks, itertools.pairwise(tops), strict=True):
        _draw_target(axes, top, name, row, lanes)
        if row["source_f1"]:
            ends = (top - GAP / 2, next_top - GAP / 2)
            axes.vlines(row["source_f1"]["mean"], *ends, color=INK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)

    axes.set_ylim(tops[-1] - GAP / 2, -GAP / 2)
    axes.set_xlim(0, RIGHT_EDGE)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_xlabel("macro F1" if matrix["task"] == "classification" else "entity F1", loc="left")
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)
    title = textwrap.fill(_title(matrix), 78)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(_caption(matrix), x=0.012, ha="left", fontsize=9, color="#555555")
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _lanes(matrix: dict, row: dict) -> list[tuple[str, str, dict]]:
    """(kind, label, figure) of a target's columns other than zero-shot, in order."""
    columns = [(column, row[f"{column['key']}_f1"]) for column in matrix["columns"][1:]]
    return [(_kind(column["key"]), column["label"], figure) for column, figure in columns if figure]


def _draw_target(axes, top: float, name: str, row: dict, lanes: list[tuple[str, str, dict]]) -> None:
    """Draw one host: a thick bar for the zero-shot score, a thin line with a mark for each other figure."""
    shape = f"{row['num_layers']} blocks × {row['hidden_size']}"
    axes.text(-0.02, top + 0.35, name, ha="right", va="center", fontsize=10, fontweight="bold", color=INK)
    axes.text(-0.02, top + 1.25, shape, ha="right", va="center", fontsize=8.5, color="#555555")
    if zero_shot := row["zero_shot_f1"]:
        middle, mean = top + BAR / 2, zero_shot["mean"]
        axes.barh(middle, mean, BAR, color=COLOURS["zero_shot"], zorder=2)
        axes.errorbar(mean, middle, xerr=zero_shot["sd"], color=INK, capsize=3, zorder=4)
        bold = {"va": "center", "fontsize": 11, "fontweight": "bold", "zorder": 4}
        if mean > ROOM_INSIDE:
            where = mean - (zero_shot["sd"] or 0) - 0.018
            axes.text(where, middle, f"zero-shot  {mean:.3f}", ha="right", color="white", **bold)
        else:
            axes.text(_end(zero_shot), middle, f"{mean:.3f}  zero-shot", color=INK, bbox=HALO, **bold)
    for number, (kind, label, figure) in enumerate(lanes):
        mean, y, colour = figure["mean"], top + BAR + LANE * (number + 0.65), COLOURS.get(kind, CONTROL_COLOUR)
        axes.hlines(y, 0, mean, color=colour, linewidth=1.6, alpha=0.55, zorder=2)
        axes.errorbar(mean, y, xerr=figure["sd"], fmt=MARKS[kind], color=colour, markersize=6, capsize=2, zorder=4)
        text = f"{mean:.3f}  {label}"
        axes.text(_end(figure), y, text, va="center", fontsize=8.5, color=INK, bbox=HALO, zorder=3)


def _end(figure: dict) -> float:
    """Position where the text beside a mark starts."""
    return figure["mean"] + (figure["sd"] or 0) + 0.018


def _kind(key: str) -> str:
    """Kind of a column: "delta_500" → "delta", "lora_r8" → "lora"; other keys are unchanged."""
    first = key.split("_")[0]
    return first if first in MARKS else key


def _title(matrix: dict) -> str:
    names = [host["name"] for host in matrix["source_hosts"]]
    if matrix["leave_one_out"]:
        return "One adapter file, trained on the other hosts, on a host it has never seen"
    return f"One adapter file, trained on {' and '.join(names)}, on hosts it has never seen"


def _caption(matrix: dict) -> str:
    source, seeds, size = matrix["source_f1"], matrix["seeds"], matrix["adapter_bytes"]
    dashed = "on the first host that it was trained on" if matrix["leave_one_out"] else "where it was trained"
    parts = [
        f"{matrix['data']['name']}, " + (f"mean and s.d. of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"),
        "zero-shot: no label of the host, no gradient step",
        f"dashed: the file {dashed}" + (f", {source['mean']:.3f}" if source else ""),
    ]
    parts += [f"{size / 1000:,.0f} kB"] if size else []
    return textwrap.fill("   ·   ".join(parts), 130)
