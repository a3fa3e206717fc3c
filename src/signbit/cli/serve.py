"""``signbit serve``."""

from __future__ import annotations

from typing import Any

import click

from signbit.cli import options as shared
from signbit.console import ConsoleProgress


@click.command("serve")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--name", help="What requests call the model.  [default: MODEL's last part]")
@click.option("--api-key", metavar="KEY", help="What clients must send.  [default: SIGNBIT_API_KEY, if it is set]")
@click.option("--slots", type=click.IntRange(1, 256), default=8, show_default=True, help="Texts written at once.")
@click.option("--queue", type=click.IntRange(min=0), default=64, show_default=True, help="Prompts that may wait.")
@click.option("--context", type=int, help="Tokens of prompt and answer.  [default: the model's limit, at most 4096]")
@click.option("--max-body", type=click.IntRange(1, 1024), default=4, show_default=True, help="MiB of a request.")
@click.option(
    "--grace", type=float, default=30, show_default=True, help="Seconds to finish answers when it is told to stop."
)
@shared.device
@shared.activations
@shared.trust
def serve_command(model: str, **options: Any) -> None:
    """Serve MODEL to other programs: OpenAI's API at /v1, a page to chat at /, metrics for Prometheus."""
    from signbit.serving.run import serve

    serve(model, progress=ConsoleProgress(), **options)
