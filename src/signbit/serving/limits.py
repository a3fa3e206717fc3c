"""Who may ask, and how much: a small layer before the routes.

The host check keeps web pages out: a page that has its own name resolve to 127.0.0.1 would otherwise talk to a server
on loopback as if it were its own. For the same reason bodies must say that they are JSON, which a browser sends to
another origin only after asking, and is never told yes.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from signbit.serving.errors import ApiError
from signbit.serving.metrics import Metrics

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")
_BODY_SECONDS = 60
# Bodies that are too long are read on for a while, or the client would see a broken connection and not the answer.
_DRAINED = 64 * 2**20


class Gate:
    """Refuses those who lack the key or come for another host; counts the others by route and status."""

    def __init__(self, app: _App, *, api_key: str | None, loopback: bool, metrics: Metrics) -> None:
        self._app, self._metrics, self._loopback = app, metrics, loopback
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: _Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                route = path if path in _ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        error = self._refusal(scope)
        if error is None:
            await self._app(scope, receive, counted)
        else:
            await answer(error)(scope, receive, counted)

    def _refusal(self, scope: _Message) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            if self._loopback and not is_loopback(_host(headers.get(b"host", b"localhost").decode("latin-1"))):
                return ApiError(403, "this server answers to localhost only: use that name, or give it an API key")
            return None
        path = scope["path"]
        if not path.startswith("/v1/") and path not in ("/v1", "/metrics", "/openapi.json"):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        message = "the API key is wrong" if key else "an API key is needed: send Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a JSON request; ApiError if it is too long, too slow, or says that it is something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= most:
                    body += piece
                elif size > _DRAINED:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS} seconds") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    if size > most:
        raise ApiError(413, f"the body is larger than {most:,} bytes: shorten it", code="request_too_large")
    return bytes(body)


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """Without the port and the brackets of IPv6."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
