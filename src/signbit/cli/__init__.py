"""The command line: parses, calls the API, prints.

Output for people goes to stderr; ``--json FILE`` writes one JSON object, to stdout when FILE is ``-``. Exit status: 0
done; 2 bad usage or bad input, with one line that says what and what to do; 1 an internal failure.
"""

from __future__ import annotations

import os
import signal
import traceback
from typing import Any

import click
import huggingface_hub
import transformers

from signbit.cli.bench import bench_group
from signbit.cli.chat import chat_command
from signbit.cli.compare import compare_command
from signbit.cli.evaluate import eval_command
from signbit.cli.export import export_command
from signbit.cli.generate import generate_command
from signbit.cli.inspect import inspect_command
from signbit.cli.methods import methods_command
from signbit.cli.quantize import quantize_command, train_command
from signbit.cli.serve import serve_command
from signbit.cli.sweep import sweep_command
from signbit.errors import SignbitError
from signbit.processes import LEFT_ALONE, is_one_of_several
from signbit.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="signbit")
def app() -> None:
    """Large language models with about one bit a weight: quantized, stored and run that way.

    MODEL is a hub id, a directory, a signbit checkpoint, a .gguf file, or 'demo'.
    """


for _command in (
    quantize_command,
    train_command,
    eval_command,
    compare_command,
    inspect_command,
    generate_command,
    chat_command,
    serve_command,
    export_command,
    sweep_command,
    bench_group,
    methods_command,
):
    app.add_command(_command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # Their progress bars and warnings are about things that signbit reports itself.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    if is_one_of_several():
        signal.signal(signal.SIGTERM, _leave)
    try:
        result = app.main(arguments, prog_name="signbit", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SignbitError as error:
        return _fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        return _fail(f"{error.format_message()} (signbit {_name(error)}--help shows the usage)", 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1
    except Exception:
        traceback.print_exc()
        return _fail("internal error; please report it with the lines above", 1)


def _leave(*_: Any) -> None:
    """A launcher ends the processes that are left when one has died. At once, whatever this one is at: what is on disk
    is whole at any time."""
    os._exit(_fail(LEFT_ALONE, 128 + signal.SIGTERM))


def _name(error: click.UsageError) -> str:
    name = error.ctx.info_name if error.ctx is not None and error.ctx.parent is not None else None
    return f"{name} " if name else ""


def _fail(message: str, status: int) -> int:
    if is_one_of_several():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
    click.echo(f"signbit: {' '.join(message.split())}", err=True)
    return status
