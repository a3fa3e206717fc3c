"""The picture of pareto.py's CSV: honest bits against perplexity, and against divergence from the original.

    python benchmarks/pareto_plot.py docs/pareto.csv docs/pareto.svg

Points of several seeds are averaged (perplexities geometrically). The line is the Pareto front: nothing has both fewer
bits and a lower value than what is on it.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

# Okabe and Ito's colours, which are told apart by the colour-blind too, then darker ones.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#332288", "#117733", "#882255"]
# Where a label may go, in points from its point: near first, then farther off with a line to it.
DIRECTIONS = [(1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
DISTANCES = [6, 14, 24, 38, 55, 75]


@dataclass(frozen=True)
class Point:
    label: str
    method: str
    bits: float
    value: float


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the rows of the CSV into ``path``, whose ending says how."""
    originals = [float(row["perplexity"]) for row in rows if not row["method"]]
    rows = [row for row in rows if row["method"]]
    if not rows:
        return
    colors = {method: COLORS[i % len(COLORS)] for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    # The same rows give the same bytes.
    style = {"svg.hashsalt": "signbit", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    with pyplot.rc_context({**style, "axes.spines.right": False, "font.family": "DejaVu Sans"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
        _panel(left, _points(rows, "perplexity"), colors, "perplexity")
        _panel(right, _points(rows, "kl"), colors, "KL divergence from the original, nats a token")
        for perplexity in originals[:1]:
            left.axhline(perplexity, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
            where = (0.01, perplexity)
            left.annotate(f"original {perplexity:.3g}", where, xycoords=("axes fraction", "data"), va="top", fontsize=8)
        right.legend(frameon=False, fontsize=8, loc="upper right", title="method")
        figure.canvas.draw()  # now it is known where everything is
        for axes, column in ((left, "perplexity"), (right, "kl")):
            _label(axes, _points(rows, column))
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, facecolor="white", metadata=metadata, dpi=150)
        pyplot.close(figure)


def _points(rows: list[dict[str, str]], column: str) -> list[Point]:
    """One point a run, in the order of the CSV; those without a value that a log axis can show are left out."""
    points = []
    for run in dict.fromkeys(row["run"] for row in rows):
        same = [row for row in rows if row["run"] == run and row[column] and float(row[column]) > 0]
        if same:
            bits = sum(float(row["bits_per_weight"]) for row in same) / len(same)
            value = math.exp(sum(math.log(float(row[column])) for row in same) / len(same))
            points.append(Point(run, same[0]["method"], bits, value))
    return points


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other undercuts in both bits and value, by bits."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.value)):
        if not front or point.value < front[-1].value:
            front.append(point)
    return front


def _panel(axes: Axes, points: list[Point], colors: dict[str, str], what: str) -> None:
    front = pareto_front(points)
    axes.plot([p.bits for p in front], [p.value for p in front], color="#bbbbbb", linewidth=1.5, zorder=1)
    for point in points:
        axes.scatter(point.bits, point.value, s=30, color=colors[point.method], edgecolor="white", zorder=3)
    for method, color in colors.items():
        axes.scatter([], [], s=30, color=color, label=method)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.08)
    axes.grid(color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("bits a weight, counted from the file")
    axes.set_ylabel(what)


def _label(axes: Axes, points: list[Point]) -> None:
    """Give every point its name where that covers no point and no other name, as far as there is room."""
    figure = axes.figure
    scale = figure.dpi / 72  # pixels in a point
    places = {point: axes.transData.transform((point.bits, point.value)) for point in points}
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in places.values()]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for point in sorted(points, key=lambda p: (p.bits, p.value)):
        for dx, dy, far in ((dx * far, dy * far, far) for far in DISTANCES for dx, dy in DIRECTIONS):
            text = axes.annotate(
                point.label,
                (point.bits, point.value),
                (dx, dy),
                textcoords="offset points",
                ha="center" if dx == 0 else "left" if dx > 0 else "right",
                va="center" if dy == 0 else "bottom" if dy > 0 else "top",
                fontsize=8,
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if not inside or any(box.overlaps(other) for other in taken):
                text.remove()
                continue
            taken.append(box)
            if far > DISTANCES[0]:
                _line(axes, point, dx, dy)
            break


def _line(axes: Axes, point: Point, dx: float, dy: float) -> None:
    """From a point to its label."""
    line = axes.annotate(
        "",
        (point.bits, point.value),
        (dx, dy),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    )
    line.set_in_layout(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    with arguments.csv.open(newline="", encoding="utf-8") as stream:
        draw(list(csv.DictReader(stream)), arguments.picture)


if __name__ == "__main__":
    main()
