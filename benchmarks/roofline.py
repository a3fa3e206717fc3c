"""The roofline of the CPU kernels, from what ``signbit bench kernels`` measured.

    signbit bench kernels --json kernels.json
    python benchmarks/roofline.py kernels.json docs/roofline.svg

A product with one token reads each weight once, so bits a weight say how many weights a second memory allows: that is
the line, at the streaming read of the same runs. A point is a kind of matrix, a geometric mean over its shapes; how far
below the line it is, so much is not memory's doing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

BITS = [1, 2, 3, 4, 6, 8, 16]
MODES = {"exact": ("#0072b2", "exact"), "int8": ("#d55e00", "8-bit activations")}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the products at batch 1 into ``path``, whose ending says how."""
    rows = [row for row in result["products"] if row["batch"] == 1 and row["kernel"]]
    stream = _mean([row["stream_gigabytes_per_second"] for row in rows])
    style = {"svg.hashsalt": "signbit", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    with pyplot.rc_context({**style, "axes.spines.right": False, "font.family": "DejaVu Sans"}):
        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        axes.loglog(BITS, [8 * stream / bits for bits in BITS], color="#333333", linewidth=1)
        axes.annotate(f"memory: {stream:.0f} GB/s", (6, 8 * stream / 6), xytext=(6, 6), textcoords="offset points")
        for mode, (color, label) in MODES.items():
            _points(axes, [row for row in rows if row["activations"] == mode], color, label, name=mode == "int8")
        dense = [row for row in rows if row["activations"] == "exact"]
        speed = _mean([row["weights_per_second"] / row["times_faster_than_bf16"] for row in dense]) / 1e9
        axes.plot(16, speed, "s", color="#7f7f7f", label="bfloat16, torch")
        _scales(axes)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, facecolor="white", metadata=metadata, dpi=150)
        pyplot.close(figure)


def _points(axes: Axes, rows: Sequence[dict[str, Any]], color: str, label: str, name: bool) -> None:
    """One point for each kind of matrix; ``name``: with their names, one label for those in the same place."""
    kinds = dict.fromkeys(row["matrix"] for row in rows)
    bits = [_mean([row["bits_per_weight"] for row in rows if row["matrix"] == kind]) for kind in kinds]
    speeds = [_mean([row["weights_per_second"] / 1e9 for row in rows if row["matrix"] == kind]) for kind in kinds]
    axes.plot(bits, speeds, "o", color=color, label=label)
    if not name:
        return
    labels: list[tuple[str, float, float]] = []
    for kind, x, y in zip(kinds, bits, speeds, strict=True):
        beside = next(
            (i for i, (_, a, b) in enumerate(labels) if abs(a / x - 1) < 0.03 and abs(b / y - 1) < 0.06), None
        )
        if beside is None:
            labels.append((kind, x, y))
        else:
            labels[beside] = (f"{labels[beside][0]}; {kind}", *labels[beside][1:])
    for label, x, y in labels:
        axes.annotate(label, (x, y), xytext=(6, 3), textcoords="offset points", fontsize=8)


def _scales(axes: Axes) -> None:
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("billion weights a second, one token")
    axes.set_xticks(BITS, [str(bits) for bits in BITS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False)


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path, help="JSON of signbit bench kernels")
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.kernels.read_text(encoding="utf-8")), given.picture)


if __name__ == "__main__":
    main()
