"""``signbit chat``."""

from __future__ import annotations

from typing import Any

import click

from signbit.cli import options as shared


@click.command("chat")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The same answers again.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: what the context has room for]"
)
@click.option("--context", type=int, help="Tokens that are kept in mind.  [default: the model's limit, at most 4096]")
@shared.device
@shared.activations
@shared.trust
def chat_command(model: str, **options: Any) -> None:
    """Talk with MODEL in the terminal; in a pipe, each line of stdin is a message."""
    from signbit.serving.terminal import chat

    chat(model, **options)
