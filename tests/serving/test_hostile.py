"""Whatever is sent: an answer in OpenAI's form, no traceback, and the server goes on."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servers import Running, running

COMPLETION = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
JSON_HEADER = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(slots=2) as found:
        yield found
        assert httpx.post(f"{found.url}/v1/completions", json=COMPLETION).status_code == 200  # still there
        found.wait_until_idle()


def post(server: Running, route: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}/v1/{route}", content=content, headers=JSON_HEADER, timeout=60)


def check_error(response: httpx.Response, status: int, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 500
    assert "Traceback" not in response.text and "pydantic" not in response.text
    assert param is None or error["param"] == param


WRONG: list[tuple[str, Any]] = [
    ("model", 5),
    ("prompt", 5),
    ("prompt", {"a": 1}),
    ("prompt", ["a", 5]),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [-1]),
    ("prompt", [300]),
    ("prompt", [2**70]),
    ("prompt", ["a"] * 1000),
    ("prompt", None),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 2**70),
    ("max_tokens", "3"),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("top_p", 1.01),
    ("n", 0),
    ("n", 3),  # there are two slots
    ("n", 129),
    ("seed", 2**64),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a"] * 100),
    ("stop", [5]),
    ("stop", "x" * 5000),
    ("logprobs", 21),
    ("logprobs", True),
    ("logit_bias", {"-1": 5}),
    ("logit_bias", {"300": 5}),
    ("logit_bias", {"9" * 40: 5}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", [1]),
    ("stream", "yes"),
    ("stream_options", {"usage": True}),
    ("frequency_penalty", 3),
    ("best_of", 4),
    ("suffix", "the end"),
    ("response_format", {"type": "json_object"}),
    ("guided_json", {}),
    ("x" * 5000, 1),
    ("\u0000\n", 1),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_wrong_values(server: Running, key: str, value: Any) -> None:
    check_error(post(server, "completions", {**COMPLETION, key: value}), 400)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [5],
        [{"role": "user"}],
        [{"role": "wizard", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "a" * 200_000}],
        [{"role": "user", "content": "a"}] * 500,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_wrong_messages(server: Running, messages: Any) -> None:
    check_error(post(server, "chat/completions", {**CHAT, "messages": messages}), 400, "messages")


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_what_would_change_the_answer_is_refused(server: Running, key: str) -> None:
    check_error(post(server, "chat/completions", {**CHAT, key: [{"name": "f"}]}), 400)
    empty: list[Any] = [None, []]
    for nothing in empty:
        assert post(server, "chat/completions", {**CHAT, key: nothing, "user": "me"}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "tiny", "prompt": "\xc3\x28"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1e999}',
        b"[" * 200_000,
        b'{"prompt":' * 50_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"9" * 100_000,
        bytes(range(256)) * 10,
    ],
    ids=lambda value: repr(value[:20]),
)
def test_bodies_that_make_no_sense(server: Running, body: bytes) -> None:
    for route in ("completions", "chat/completions"):
        check_error(post(server, route, body), 400)


def test_control_characters_are_text(server: Running) -> None:
    answer = post(server, "completions", {**COMPLETION, "prompt": "\x00\x1b[2J\x07\u202e\ufeff\r\n", "echo": True})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"].startswith("\x00\x1b[2J\x07")


def test_too_large(server: Running) -> None:
    """Bodies over the limit, with their length said beforehand and without; 10 MB and more."""
    prompt = "word " * 2_200_000
    check_error(post(server, "completions", {**COMPLETION, "prompt": prompt}), 413)
    pieces = (b" " * 65536 for _ in range(200))
    check_error(httpx.post(f"{server.url}/v1/completions", content=pieces, headers=JSON_HEADER, timeout=60), 413)
    started = time.monotonic()
    check_error(post(server, "completions", {**COMPLETION, "prompt": "a" * 1_000_000}), 400, "prompt")
    assert time.monotonic() - started < 5


def test_other_ways_to_ask(server: Running) -> None:
    check_error(httpx.post(f"{server.url}/v1/completions", content=b"{}"), 415)
    check_error(httpx.get(f"{server.url}/v1/completions"), 405)
    check_error(httpx.get(f"{server.url}/v1/no/such/{'x' * 1000}"), 404)
    check_error(httpx.get(f"{server.url}/v1/models/%00%ff%2e%2e%2f"), 404)
    check_error(httpx.post(f"{server.url}/v1/completions", json={**COMPLETION, "model": "gpt-4"}), 404, "model")
    check_error(httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}), 403)


def test_not_http(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for data in (
        b"\x16\x03\x01garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            assert b"Traceback" not in line.recv(65536)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["model", "prompt", "messages", "max_tokens", "n", "stop", "temperature", "logprobs", "stream_options", "seed"]


@given(
    st.sampled_from(["completions", "chat/completions"]),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), JSON, max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json(server: Running, route: str, changes: dict[str, Any]) -> None:
    usual = COMPLETION if route == "completions" else CHAT
    response = post(server, route, {**usual, **changes})
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        check_error(response, response.status_code)
