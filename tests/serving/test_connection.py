"""What reaches the socket without being a request: an answer in OpenAI's form or none, and nothing in the log."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from servers import Running, running
from signbit.serving import connection
from signbit.serving.connection import Connection, most_connections

BODY = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found
        assert httpx.get(f"{found.url}/health").json() == {"status": "ok", "active": 0, "waiting": 0}


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def everything(line: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    try:
        while piece := line.recv(65536):
            found += piece
    except ConnectionResetError:  # it was closed with something of ours unread
        pass
    return found


def error_of(answer: bytes) -> dict[str, Any]:
    """The error of the last answer."""
    error: dict[str, Any] = json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("pieces", [[], [b"GET /health HTT"], [b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n"] * 50]])
def test_a_head_that_never_ends(server: Running, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a byte comes now and then."""
    monkeypatch.setattr(Connection, "head_seconds", 0.5)
    started = time.monotonic()
    with connect(server) as line:
        for piece in pieces:
            try:
                line.sendall(piece)
            except OSError:
                break
            time.sleep(0.05)
        found = everything(line)
    assert 0.4 < time.monotonic() - started < 5
    assert not found or (found.startswith(b"HTTP/1.1 408") and "did not arrive" in error_of(found)["message"])


def test_a_second_head_that_never_ends(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(server) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while b'"ok"' not in found:
            found += line.recv(65536)
        monkeypatch.setattr(Connection, "head_seconds", 0.3)
        line.sendall(b"GET /health HTTP/1.1\r\n")
        assert b" 408 " in everything(line)


def test_a_slow_body_is_not_a_slow_head(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.3)
    with connect(server) as line:
        line.sendall(HEAD + JSON + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        time.sleep(0.8)
        line.sendall(BODY)
        assert everything(line).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ([b"\x16\x03\x01\r\n\r\n"], 400),
        ([b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"], 400),
        ([HEAD + JSON + CHUNKED, b"ZZZ\r\n"], 400),
        ([HEAD + CHUNKED, b"ZZZ\r\n"], 415),  # the answer has been sent
        ([HEAD + JSON + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, b"\x00\xff\r\n\r\n"], 400),
        ([b"GET /" + b"a" * 200_000], 400),
        ([b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000], 400),
    ],
    ids=["tls", "two hosts", "bad chunk", "bad chunk after the answer", "bad next", "long line", "long header"],
)
def test_not_http(server: Running, data: list[bytes], status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with connect(server) as line:
        for piece in data:
            line.sendall(piece)
            time.sleep(0.2)
        found = everything(line)
    assert not found or b"HTTP/1.1 %d " % status in found
    assert not found or error_of(found)
    assert not caplog.records


def test_who_closes_one_side_has_gone_away(server: Running) -> None:
    """It looks the same as a client that has closed both, whose slot must become free."""
    endless = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 150, "logit_bias": {"1": -100}}).encode()
    with connect(server) as line:
        line.sendall(HEAD + JSON + b"Content-Length: %d\r\n\r\n" % len(endless) + endless)
        line.shutdown(socket.SHUT_WR)
        assert everything(line) == b""
    server.wait_until_idle()


def test_too_many(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_connections() > 0
    monkeypatch.setattr(connection, "most_connections", lambda: 3)
    lines = [connect(server) for _ in range(5)]
    answers = [everything(line) for line in lines[3:]]
    for line in lines:
        line.close()
    assert all(answer.startswith(b"HTTP/1.1 503") and error_of(answer) for answer in answers)
    for _ in range(50):
        if httpx.get(f"{server.url}/health").status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("connections that were closed still count")
