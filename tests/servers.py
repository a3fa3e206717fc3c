"""A server in this process, on a free port of loopback."""

import copy
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from signbit.serving.app import Service, make_app
from signbit.serving.connection import Connection
from signbit.serving.engine import Engine
from signbit.serving.prompts import Prompts
from signbit.serving.run import bind
from signbit.serving.scheduler import Scheduler
from tiny import build, tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system prompt comes first') }}{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


@dataclass
class Running:
    url: str
    service: Service

    @property
    def engine(self) -> Engine:
        return self.service.scheduler.engine

    def wait_until_idle(self) -> None:
        """Slots are freed between steps, so soon and not at once."""
        for _ in range(200):
            if not self.engine.active and not self.service.scheduler.waiting:
                return
            time.sleep(0.05)
        raise AssertionError("slots are still taken")


@contextmanager
def running(
    *, slots: int = 4, queue: int = 8, context: int = 200, endless: bool = False, **options: Any
) -> Iterator[Running]:
    """endless: no token ends a text, so that it is as long as was asked for."""
    model, words = build("llama"), copy.deepcopy(tokenizer())  # which other tests share
    words.chat_template = TEMPLATE
    engine = Engine(model, words, slots)
    if endless:
        engine.ends = frozenset()
    scheduler = Scheduler(engine, queue)
    service = Service("tiny", scheduler, Prompts(words, model.config, context), 2**20)
    listening: socket.socket = bind("127.0.0.1", 0)
    app = make_app(service, **options)
    server = uvicorn.Server(
        uvicorn.Config(app, http=Connection, log_level="critical", ws="none", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    scheduler.start()
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join()
        scheduler.stop()
