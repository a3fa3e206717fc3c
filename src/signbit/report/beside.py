"""The report beside a checkpoint: its bits, its layers, and how to make it again."""

from __future__ import annotations

from pathlib import Path

from signbit import accounting
from signbit.report import charts
from signbit.report.heatmap import heat_maps
from signbit.report.making import making_of
from signbit.report.rendering import render
from signbit.safetensors_file import write_text

FILE = "report.html"


def checkpoint_page(directory: Path) -> str:
    """The page of one checkpoint. It holds nothing that differs between two runs of the same command, neither times nor
    where the checkpoint lies: a resumed run ends in the same bytes as an uninterrupted one."""
    found = accounting.inspect(directory)
    making = making_of(directory, found)
    heldout = None
    if len(making.heldout) > 1:
        heldout = charts.curve(making.heldout, x="step", y="held-out perplexity", title="Held-out perplexity by step")
    return render(
        "checkpoint.html",
        found=found,
        making=making,
        maps=heat_maps([("", making)]),
        heldout=heldout,
    )


def write_checkpoint_page(directory: Path) -> None:
    """Put a checkpoint's page beside its weights."""
    write_text(directory / FILE, checkpoint_page(directory))
