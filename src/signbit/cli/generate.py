"""``signbit generate``."""

from __future__ import annotations

from typing import Any

import click

from signbit import inference
from signbit.cli import options as shared


@click.command("generate")
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@shared.device
@shared.activations
@shared.trust
def generate_command(model: str, prompt: str, **options: Any) -> None:
    """Continue PROMPT with MODEL; the new text goes to stdout."""
    click.echo(inference.generate(model, prompt, **options))
