"""``signbit eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from signbit import console
from signbit.cli import options as shared
from signbit.errors import SignbitError
from signbit.evaluation import evaluate


@click.command("eval")
@click.argument("model")
@click.option("--perplexity", multiple=True, metavar="SOURCE", help="Text to score; may be given more than once.")
@click.option("--seqlen", type=int, default=2048, show_default=True, help="Tokens in a window.")
@click.option("--windows", type=int, help="Only the first so many windows.")
@click.option("--against", metavar="ORIGINAL", help="Also the divergence from this model.")
@shared.device
@shared.activations
@shared.trust
@shared.json_option
def eval_command(model: str, perplexity: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Perplexity of MODEL, and its divergence from the original."""
    if json_file is not None and not Path(json_file).parent.is_dir():
        raise SignbitError(f"{json_file} cannot be written: {Path(json_file).parent} does not exist")
    result = evaluate(model, perplexity=perplexity or ("wikitext2",), progress=console.ConsoleProgress(), **options)
    for source, value in result["perplexity"].items():
        line = f"perplexity on {source}: {value:,.4g} ({result['tokens'][source]:,} tokens)"
        if "divergence" in result:
            divergence = result["divergence"][source]
            line += f", the original's {result['original_perplexity'][source]:,.4g}, KL {divergence['kl']:.4f}"
            line += f", same top token {divergence['top1_agreement']:.1%}"
        console.console.print(line)
    shared.write_json(result, json_file)
