"""``signbit compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from signbit import console
from signbit.cli import options as shared
from signbit.cli.evaluate import evaluation_options
from signbit.report.compare import compare
from signbit.report.measure import PROMPTS


@click.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write, an .html file.")
@click.option(
    "--markdown", type=click.Path(path_type=Path), help="Also a table and pictures: an .md file or directory."
)
@click.option("--against", metavar="ORIGINAL", help="What divergence is from; by default the first unpacked MODEL.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="To go on with; may be given more than once.")
@click.option(
    "--max-tokens", type=int, default=48, show_default=True, help="Tokens that are written after each prompt."
)
@click.option(
    "--speed/--no-speed", default=True, show_default=True, help="Time decoding and measure memory, on the CPU."
)
@evaluation_options
def compare_command(
    models: tuple[str, ...],
    out: Path,
    perplexity: tuple[str, ...],
    prompts: tuple[str, ...],
    json_file: str | None,
    **options: Any,
) -> None:
    """Measure MODELs, packed or not, and write one page that compares them.

    Perplexity is on wikitext2 unless a text or a task is named.
    """
    shared.check_json(json_file)
    progress = console.ConsoleProgress()
    result = compare(
        models, out, perplexity=perplexity or None, prompts=prompts or PROMPTS, progress=progress, **options
    )
    progress.note(f"{out} is written: open it in a browser")
    shared.write_json(result, json_file)
