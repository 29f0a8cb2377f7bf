"""Draws the paper's comparison: score against the bytes of many tasks on many hosts, one panel per host and task."""

from pathlib import Path

from modeling_unihyperlora.storage import replacing
from scripts.research.paper_tables import MANY, METHODS, Row
from scripts.research.transfer_picture import COLOURS, INK, require_matplotlib

ZERO_SHOT = "unihyperlora, zero-shot"  # its marker is hollow
DRAWN = {  # method → colour, mark
    ZERO_SHOT: (COLOURS["zero_shot"], "o"),
    "unihyperlora": (COLOURS["zero_shot"], "o"),
    "unihyperlora-refined": (COLOURS["refined"], "P"),
    "unihyperlora-task": (COLOURS["delta"], "o"),
    "unihyperlora-task-small": (COLOURS["delta"], "p"),
    "unihyperlora-cost": (COLOURS["delta"], "*"),
    "sat_lora": (COLOURS["own_stream"], "D"),
    "lora": (COLOURS["lora"], "^"),
    "lora-r1": (COLOURS["lora"], "v"),
    "full": ("#CC79A7", "X"),
    "probe": (COLOURS["probe"], "s"),
}
PANEL, DPI = 2.7, 100  # inches
FRONT = "#BBBBBB"


def draw(rows: list[Row], path: str | Path) -> None:
    """Draw the rows of ``paper_tables.rows_of`` as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
        AdapterFileError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.method in DRAWN]
    hosts, data = (sorted({getattr(row, name) for row in rows}) for name in ("host", "data"))
    figure = Figure(figsize=(0.7 + PANEL * len(data), 1.5 + 0.8 * PANEL * len(hosts)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(hosts), len(data), squeeze=False, sharex=True)
    for line, host in zip(panels, hosts, strict=True):
        for axes, name in zip(line, data, strict=True):
            here = [row for row in rows if (row.host, row.data) == (host, name)]
            _panel(axes, here) if here else axes.set_axis_off()
            axes.set_title(f"{name}, {host}" if here else "", fontsize=8.5, color=INK, loc="left")
    handles = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    figure.supylabel("F1 of entities, or macro F1", fontsize=9)
    figure.suptitle("Score against stored bytes; grey: nothing scores more with fewer", x=0.01, ha="left", fontsize=11)
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _panel(axes, rows: list[Row]) -> None:
    points = [(row.bytes_in_all(), row.mean("eval_f1"), row.method) for row in rows]
    moved = [row for row in rows if row.method == "unihyperlora" and row.mean("zero_shot_f1") is not None]
    points += [(row.bytes_in_all(with_delta=False), row.mean("zero_shot_f1"), ZERO_SHOT) for row in moved]
    front = front_of([(size, score) for size, score, _ in points])
    axes.step(*zip(*front, strict=True), where="post", color=FRONT, linewidth=1.2, zorder=1) if front else None
    for size, score, method in points:
        colour, mark = DRAWN[method]
        label, face = METHODS.get(method, method), "white" if method == ZERO_SHOT else colour
        axes.plot(size, score, mark, color=colour, markerfacecolor=face, markersize=6, label=label, zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel(f"bytes of {MANY} tasks on {MANY} hosts", fontsize=7.5)
    axes.margins(x=0.12, y=0.15)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pareto front of points (bytes, score): no other point has fewer bytes and a higher score. Ordered by bytes."""
    front: list[tuple[float, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((size, score))
    return front
