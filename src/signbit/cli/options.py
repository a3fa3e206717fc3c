"""What several commands share: options, and writing a result as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from signbit.errors import SignbitError
from signbit.modules import ACTIVATIONS
from signbit.safetensors_file import write_text

device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
trust = click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the model.")
activations = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="exact",
    show_default=True,
    help="int8 rounds what packed matrices are multiplied with, for speed (CPU kernels).",
)
json_option = click.option("--json", "json_file", metavar="FILE", help="Write the result as JSON; - is stdout.")


def check_json(file: str | None) -> None:
    """Refuse, before hours of work, a file that cannot be written after them."""
    if file is not None and not Path(file).parent.is_dir():
        raise SignbitError(f"{file} cannot be written: {Path(file).parent} does not exist")


def write_json(result: dict[str, Any], file: str | None) -> None:
    if file is None:
        return
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if file == "-":
        click.echo(text, nl=False)
        return
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or device is written to, never replaced
        else:
            write_text(path.resolve(), text)
    except OSError as error:
        raise SignbitError(f"{file} cannot be written: {error.strerror}") from error
