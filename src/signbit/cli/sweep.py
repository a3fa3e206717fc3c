"""``signbit sweep``."""

from __future__ import annotations

from pathlib import Path

import click

from signbit import console
from signbit.sweeping.run import sweep


@click.command("sweep")
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of all trials and results.")
@click.option("--jobs", type=int, default=1, show_default=True, help="Trials at a time.")
@click.option("--ray", metavar="ADDRESS", help="Run them on a Ray cluster: auto, its address, or here for a new one.")
def sweep_command(grid: Path, out: Path, jobs: int, ray: str | None) -> None:
    """Quantize and evaluate every recipe with every model of the YAML file GRID.

    What is finished is kept: the same command goes on where it was stopped, and tries again what failed.
    """
    rows = sweep(grid, out, jobs=jobs, ray=ray, progress=console.ConsoleProgress())
    console.console.print(console.sweep_table(rows))
