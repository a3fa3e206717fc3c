"""``signbit inspect``."""

from __future__ import annotations

import click

from signbit import accounting, console
from signbit.cli import options as shared


@click.command("inspect")
@click.argument("model")
@shared.json_option
def inspect_command(model: str, json_file: str | None) -> None:
    """Bits per weight, itemised, counted from the files of MODEL."""
    result = accounting.inspect(model)
    for table in console.inspection_tables(result):
        console.console.print(table)
    if result["unquantized"]:
        console.console.print(console.unquantized_table(result["unquantized"]))
    shared.write_json(result, json_file)
