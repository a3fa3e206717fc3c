"""``signbit serve``: a model, a socket, and a clean end.

A first SIGTERM or SIGINT (ctrl-C) lets nobody in any more and finishes what is under way; after the grace time whoever
is still being answered is told so and let go. A second ctrl-C does that at once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
from pathlib import Path
from types import FrameType
from typing import Any

from signbit import inference
from signbit.errors import SignbitError
from signbit.modules import set_activations
from signbit.progress import Progress, Silent
from signbit.serving.engine import Engine
from signbit.serving.prompts import Prompts, context_length
from signbit.serving.scheduler import Scheduler

KEY_VARIABLE = "SIGNBIT_API_KEY"


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    slots: int = 8,
    queue: int = 64,
    context: int | None = None,
    max_body: int = 4,
    grace: float = 30,
    device: str = "auto",
    activations: str = "exact",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Serve MODEL over OpenAI's API until the process is told to stop.

    name: what requests call the model; by default the last part of ``model``.
    api_key: what clients must send; by default the environment's SIGNBIT_API_KEY, if it is set.
    slots: sequences written at once. queue: prompts that may wait for one; more are refused with 429.
    context: tokens of a prompt and its answer; by default the model's limit, at most 4096.
    max_body: of a request, in MiB. grace: seconds to finish what is under way at the end.

    SignbitError if the address cannot be bound, the model cannot be served, or the serve extra is not installed.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise SignbitError(f"{package} is not installed: pip install 'signbit[serve]'")
    from signbit.serving.app import Service, make_app
    from signbit.serving.limits import is_loopback

    progress = progress or Silent()
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise SignbitError("the API key must be of printable ASCII characters, without spaces around it")
    for what, value, least in (("slots", slots, 1), ("queue", queue, 0), ("max-body", max_body, 1)):
        if value < least:
            raise SignbitError(f"{what} is {value}: use at least {least}")
    if not 0 <= grace < float("inf"):
        raise SignbitError(f"grace is {grace}: use a number of seconds of at least 0")
    listening = bind(host, port)
    with listening:
        opened, tokenizer = inference.open_model(model, device=device, trust_remote_code=trust_remote_code)
        set_activations(opened, activations)
        length = context_length(opened.config, context)
        engine = Engine(opened, tokenizer, slots)
        scheduler = Scheduler(engine, queue)
        prompts = Prompts(tokenizer, opened.config, length)
        service = Service(name or model_name(model), scheduler, prompts, max_body * 2**20)
        loopback = is_loopback(host)
        address = listening.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        progress.note(f"serving {service.name} at http://{shown}:{address[1]}: a page to chat, and OpenAI's API at /v1")
        together = "in one batch" if engine.batched else "in turns"
        progress.note(f"{length} tokens of context; {slots} texts at once, {together}; {queue} prompts may wait")
        if not prompts.has_template:
            progress.note("the tokenizer has no chat template: messages are written as 'User: ...', 'Assistant: ...'")
        if not loopback and key is None:
            progress.note(f"warning: anybody who reaches {host} can use it; set an API key ({KEY_VARIABLE})")
        app = make_app(service, api_key=key, loopback=loopback)
        scheduler.start()
        _run(app, scheduler, listening, grace)
        progress.note("stopped")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded; SignbitError if there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SignbitError(f"cannot listen at {host}:{port} ({reason}): use another --host or --port") from error
    return listening


def model_name(model: str) -> str:
    """What a model is called that was given by a path, a hub id or the word demo."""
    path = Path(model)
    if path.exists():
        return path.resolve().name
    return model


def _run(app: Any, scheduler: Scheduler, listening: socket.socket, grace: float) -> None:
    import uvicorn

    from signbit.serving.connection import BACKLOG, Connection

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Without super: it would raise the signal again at the end, and the process would seem to have failed.
            if self.should_exit:
                self.force_exit = True
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            scheduler.drain()
            cutting = asyncio.create_task(self._cut_off())
            await super().shutdown(sockets)
            cutting.cancel()

        async def _cut_off(self) -> None:
            waited = 0.0
            while waited < grace and not self.force_exit:
                await asyncio.sleep(0.1)
                waited += 0.1
            self.force_exit = False  # streams end with an error of ours, which takes a moment, not with a broken line
            await asyncio.to_thread(scheduler.stop)

    config = uvicorn.Config(
        app,
        http=Connection,
        backlog=BACKLOG,
        log_level="error",  # warnings are about clients, which could fill the log with them
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=30,
        # What does not end even though its jobs did: a client that does not read.
        timeout_graceful_shutdown=int(grace) + 10,
    )
    try:
        Server(config).run(sockets=[listening])
    finally:
        scheduler.stop()
