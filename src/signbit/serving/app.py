"""The routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics, and a page to chat at /.

A request becomes jobs for the scheduler, whose thread tells what happens to them; here it is heard in the event loop.
Whichever way a request ends, its jobs are cancelled last: that frees the slots of clients that went away and does
nothing to jobs that are finished.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from signbit.errors import SignbitError
from signbit.serving.detokenize import TokenNames, decode
from signbit.serving.errors import ApiError
from signbit.serving.job import Entry, Failure, Job, Piece
from signbit.serving.limits import Gate, answer, read_body
from signbit.serving.metrics import Metrics
from signbit.serving.prompts import Prompts, PromptTooLongError
from signbit.serving.replies import ChatReply, CompletionReply, Reply, usage
from signbit.serving.scheduler import QueueFullError, Scheduler, ShuttingDownError
from signbit.serving.schema import ChatRequest, CompletionRequest, parse
from signbit.version import __version__

_log = logging.getLogger(__name__)
_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
T = TypeVar("T")


@dataclass
class Service:
    """What the routes need. most_body: bytes of a request."""

    name: str
    scheduler: Scheduler
    prompts: Prompts
    most_body: int
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.tokenizer = self.scheduler.engine.tokenizer
        self.names = TokenNames(self.tokenizer)
        self.metrics = Metrics(self.scheduler)
        # One at a time: tokenizers use all cores, and the model needs them.
        self._tokenizing = anyio.CapacityLimiter(1)

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"the model {name[:80]!r} is not served here, only {self.name!r}", "model", "model_not_found"
            )

    @property
    def card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "signbit",
            "max_model_len": self.prompts.context,
        }

    async def tokens(self, make: Callable[..., list[int]], *arguments: Any, param: str) -> list[int]:
        """A prompt, made on another thread: long ones take a while."""
        try:
            return await anyio.to_thread.run_sync(make, *arguments, limiter=self._tokenizing)
        except PromptTooLongError as error:
            raise ApiError(400, str(error), param, "context_length_exceeded") from None
        except SignbitError as error:
            raise ApiError(400, str(error), param) from None

    def room(self, prompt: Sequence[int], wanted: int | None) -> int:
        """How many tokens to write: as many as are wanted, or as fit."""
        most = self.prompts.context - len(prompt)
        if wanted is not None and wanted > most:
            raise ApiError(
                400,
                f"the context is {self.prompts.context} tokens: {len(prompt)} of the prompt and {wanted} to be written "
                f"are too many; ask for at most {most}",
                "max_tokens",
                "context_length_exceeded",
            )
        return most if wanted is None else wanted

    def check_choices(self, choices: int, jobs: int = 1) -> None:
        scheduler = self.scheduler
        if choices > scheduler.engine.slots:
            raise ApiError(400, f"n is {choices}, this server writes {scheduler.engine.slots} texts at once", "n")
        if jobs > scheduler.engine.slots + scheduler.queue:
            raise ApiError(400, f"{jobs} prompts are more than this server's queue has places for", "prompt")


class Running:
    """The jobs of one request, heard from the event loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.jobs: list[Job] = []
        self._heard: asyncio.Queue[tuple[int, Piece | Failure]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open = 0

    def add(self, choices: int, **options: Any) -> None:
        first = len(self.jobs) * choices

        def tell(index: int, piece: Piece | Failure) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (first + index, piece))

        self.jobs.append(Job(tell=tell, choices=choices, **options))
        self._open += choices

    def start(self) -> None:
        scheduler = self.service.scheduler
        try:
            scheduler.submit(self.jobs)
        except QueueFullError:
            wait = str(max(1, round(scheduler.step_seconds / max(scheduler.steps, 1) * 64)))
            message = f"{scheduler.waiting} prompts are waiting already: try again in a while"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": wait}) from None
        except ShuttingDownError:
            raise ApiError(503, "the server is shutting down", code="shutting_down") from None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) until all choices are finished; ApiError if they cannot be."""
        while self._open:
            index, piece = await self._heard.get()
            if isinstance(piece, Failure):
                raise ApiError(503 if piece.code == "shutting_down" else 500, piece.message, code=piece.code)
            self._open -= piece.finish is not None
            yield index, piece

    def close(self, *, disconnected: bool = False) -> None:
        service = self.service
        service.scheduler.cancel(self.jobs)
        service.metrics.written.inc(sum(job.written for job in self.jobs))
        service.metrics.duration.observe(time.monotonic() - self.jobs[0].created)
        if self.jobs[0].first_token is not None:
            service.metrics.first_token.observe(self.jobs[0].first_token - self.jobs[0].created)
        if disconnected or self._open:
            service.metrics.cancelled.inc()


class EventStream(StreamingResponse):
    """Server-sent events; the jobs behind them end with the response, however that ends."""

    def __init__(self, running: Running, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._running = running

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self._running.close()


def make_app(service: Service, *, api_key: str | None = None, loopback: bool = True) -> FastAPI:
    """The server as an ASGI application. The scheduler has to be started by whoever runs it."""
    app = FastAPI(title="signbit", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=api_key, loopback=loopback, metrics=service.metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    page = resources.files("signbit.serving").joinpath("chat.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(
            page, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        scheduler = service.scheduler
        status = "stopped" if not scheduler.alive else "shutting down" if scheduler.draining else "ok"
        counts = {"active": scheduler.engine.active, "waiting": scheduler.waiting}
        return JSONResponse({"status": status, **counts}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card

    @app.post("/v1/completions", openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await read_body(request, service.most_body))
        return await _complete(service, request, asked)

    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await read_body(request, service.most_body))
        return await _chat(service, request, asked)

    return app


async def _complete(service: Service, request: Request, asked: CompletionRequest) -> Response:
    service.check_model(asked.model)
    sampling = asked.sampling(service.scheduler.engine.forward.vocabulary)
    prompts: list[Any] = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    if not prompts:
        raise ApiError(400, "prompt: the list is empty", "prompt")
    service.check_choices(asked.n, len(prompts))
    running, echoes = Running(service), []
    for prompt in prompts:
        make = service.prompts.text if isinstance(prompt, str) else service.prompts.tokens
        tokens = await service.tokens(make, prompt, param="prompt")
        most = service.prompts.context - len(tokens)
        usual = "max_tokens" not in asked.model_fields_set
        running.add(
            asked.n,
            prompt=tokens,
            max_tokens=service.room(tokens, min(asked.max_tokens, most) if usual else asked.max_tokens),
            sampling=sampling,
            stops=asked.stop,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.echo and asked.logprobs is not None,
        )
        echo = prompt if isinstance(prompt, str) else decode(service.tokenizer, tokens)
        echoes += [echo if asked.echo else ""] * asked.n
    reply = CompletionReply(service.name, service.names, asked.logprobs is not None)
    return await _reply(request, running, reply, asked, echoes)


async def _chat(service: Service, request: Request, asked: ChatRequest) -> Response:
    service.check_model(asked.model)
    sampling = asked.sampling(service.scheduler.engine.forward.vocabulary)
    service.check_choices(asked.n)
    roles = {"developer": "system"}
    messages = [{"role": roles.get(one.role, one.role), "content": one.text} for one in asked.messages]
    tokens = await service.tokens(service.prompts.chat, messages, param="messages")
    running = Running(service)
    running.add(
        asked.n,
        prompt=tokens,
        max_tokens=service.room(tokens, asked.limit),
        sampling=sampling,
        stops=[*asked.stop, *service.prompts.stops],
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        continues=False,
    )
    reply = ChatReply(service.name, service.names, asked.logprobs)
    return await _reply(request, running, reply, asked, [""] * asked.n)


async def _reply(
    request: Request, running: Running, reply: Reply, asked: CompletionRequest | ChatRequest, echoes: Sequence[str]
) -> Response:
    running.start()
    if asked.stream:
        return EventStream(running, _events(running, reply, asked.stream_options.include_usage, echoes))
    try:
        return await _unless_gone(request, _whole(running, reply, echoes))
    finally:
        running.close()


async def _whole(running: Running, reply: Reply, echoes: Sequence[str]) -> JSONResponse:
    texts = [[echo] for echo in echoes]
    entries: list[list[Entry]] = [[] for _ in echoes]
    finishes: list[str | None] = [None] * len(echoes)
    async for index, piece in running.pieces():
        texts[index].append(piece.text)
        entries[index] += piece.entries
        finishes[index] = piece.finish
    choices = [
        reply.whole(index, "".join(texts[index]), entries[index], finish) for index, finish in enumerate(finishes)
    ]
    return JSONResponse({**reply.envelope(choices, streamed=False), "usage": usage(running.jobs)})


async def _events(running: Running, reply: Reply, with_usage: bool, echoes: Sequence[str]) -> AsyncIterator[str]:
    more = {"usage": None} if with_usage else {}
    send = partial(_event, reply, more)
    try:
        for index, echo in enumerate(echoes):
            opening = reply.opening(index)
            if opening is not None:
                yield send(opening)
            if echo:
                yield send(reply.chunk(index, echo, (), None))
        async for index, piece in running.pieces():
            yield send(reply.chunk(index, piece.text, piece.entries, piece.finish))
        if with_usage:
            yield _data({**reply.envelope([], streamed=True), "usage": usage(running.jobs)})
    except ApiError as error:
        # The status is sent; clients look for this, and raise.
        yield _data(error.body)
        return
    yield "data: [DONE]\n\n"


def _event(reply: Reply, more: dict[str, Any], choice: dict[str, Any]) -> str:
    return _data({**reply.envelope([choice], streamed=True), **more})


def _data(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` returns; ApiError as soon as the client has closed the connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client went away")
        return await working
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What no route answers."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {str(error.detail).lower()}"
    return answer(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _any_error(request: Request, error: Exception) -> Response:
    """A bug; uvicorn logs it."""
    return answer(ApiError(500, "internal error; the server's log says what happened", code="internal_error"))


def _body_schema(kind: type[CompletionRequest] | type[ChatRequest]) -> dict[str, Any]:
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
