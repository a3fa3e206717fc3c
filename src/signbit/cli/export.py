"""``signbit export``."""

from __future__ import annotations

from pathlib import Path

import click

from signbit import console
from signbit.cli import options as shared
from signbit.exporting import FORMS, export
from signbit.exporting.dense import DTYPES
from signbit.exporting.gguf_file import TYPES


@click.command("export")
@click.argument("model")
@click.option("--to", required=True, type=click.Choice(FORMS), help="A plain Hugging Face model, or llama.cpp's file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory (dense) or .gguf file.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of dense weights.  [default: bfloat16]")
@click.option(
    "--type", "kind", type=click.Choice(TYPES), help="What matrices become that no type of GGUF holds exactly."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@shared.trust
@shared.json_option
def export_command(
    model: str,
    to: str,
    out: Path,
    dtype: str | None,
    kind: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    json_file: str | None,
) -> None:
    """Write MODEL in a form that needs no signbit."""
    result = export(
        model,
        out,
        to=to,
        dtype=dtype,
        type=kind,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=console.ConsoleProgress(),
    )
    for table in console.export_tables(result):
        console.console.print(table)
    shared.write_json(result, json_file)
