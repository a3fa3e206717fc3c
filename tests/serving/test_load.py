"""Full queues, clients that go away, and the end."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from servers import Running, running
from signbit.serving.job import Job
from signbit.serving.scheduler import QueueFullError, Scheduler

LONG = {"model": "tiny", "prompt": "Hello", "max_tokens": 190, "temperature": 1}


def post(url: str, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**LONG, **options}, timeout=60)


def together(*calls: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def call(index: int) -> None:
        found[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_full_queue() -> None:
    """Whoever does not fit is told when to come back; the others are answered."""
    with running(slots=1, queue=2, endless=True) as server:
        answers = together(*[lambda: post(server.url, max_tokens=60)] * 8)
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        server.wait_until_idle()
        assert "signbit_rejected_requests_total 0.0" not in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_slot(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(slots=1, queue=4, endless=True) as server:
        _slow_down(server, monkeypatch)
        started = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as answer:
                    next(answer.iter_lines())
                    raise httpx.ReadTimeout("enough")
            httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
        server.wait_until_idle()
        assert time.monotonic() - started < 190 * 0.05 * 0.8  # well before it would have been written
        assert post(server.url, max_tokens=2).status_code == 200
        assert "signbit_disconnected_requests_total 1.0" in httpx.get(f"{server.url}/metrics").text


def test_who_waits_may_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(slots=1, queue=4, endless=True) as server:
        _slow_down(server, monkeypatch)
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as first:
            next(first.iter_lines())
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
            for _ in range(100):
                if not server.service.scheduler.waiting:
                    break
                time.sleep(0.05)
            assert not server.service.scheduler.waiting
        server.wait_until_idle()


def test_places_in_the_queue_are_free_at_once() -> None:
    """And not after the step that is under way, which others would be refused for."""
    busy: Any = SimpleNamespace(slots=1, active=1)
    scheduler = Scheduler(busy, queue=2)
    jobs = [Job(prompt=[1], max_tokens=1, tell=lambda index, piece: None) for _ in range(3)]
    scheduler.submit(jobs[:2])
    with pytest.raises(QueueFullError):
        scheduler.submit(jobs[2:])
    scheduler.cancel(jobs[:1])
    scheduler.submit(jobs[2:])
    assert scheduler.waiting == 2


def _slow_down(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step = server.engine.step

    def slowly() -> None:
        time.sleep(0.05)
        step()

    monkeypatch.setattr(server.engine, "step", slowly)


def test_short_ones_pass_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes later joins the batch and is answered while the earlier is still being written."""
    with running(slots=2, endless=True) as server:
        _slow_down(server, monkeypatch)
        ended: dict[str, float] = {}

        def ask(name: str, tokens: int, after: float) -> None:
            time.sleep(after)
            assert post(server.url, max_tokens=tokens).status_code == 200
            ended[name] = time.monotonic()

        threads = [threading.Thread(target=ask, args=arguments) for arguments in (("long", 60, 0), ("short", 3, 0.3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended["short"] < ended["long"] - 0.5


def test_a_failing_model_is_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        forward = server.engine.forward
        real = forward.model.forward

        def fail(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("out of something")

        monkeypatch.setattr(forward.model, "forward", fail)
        answer = post(server.url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "out of something" not in answer.text
        monkeypatch.setattr(forward.model, "forward", real)
        assert post(server.url).status_code == 200


# --- the command ------------------------------------------------------------------------------------------------------


def start(model: Path, log: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "signbit", "serve", str(model), "--port", "0", "--device", "cpu", *options]
    server = subprocess.Popen(command, stderr=log.open("wb"))
    for _ in range(600):
        if found := re.search(r"http://127.0.0.1:\d+", log.read_text()):
            httpx.Client(transport=httpx.HTTPTransport(retries=20)).get(f"{found[0]}/health")
            return server, found[0]
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_graceful_end(packed_dir: Callable[..., Path], tmp_path: Path) -> None:
    """SIGTERM: what is under way is finished, or cut off after the grace time, which the client is told. Status 0."""
    model = packed_dir("llama")
    for grace, last in (("30", "data: [DONE]"), ("0", "shutting_down")):
        log = tmp_path / f"log-{grace}"
        server, url = start(model, log, "--grace", grace)
        body = {**LONG, "model": model.name, "stream": True, "max_tokens": 240, "logit_bias": {"1": -100}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert last in rest[-1]
        if grace == "30":
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.wait(30) == 0, log.read_text()
        said = log.read_text()
        assert said.strip().endswith("stopped")
        assert "Traceback" not in said


def test_bad_starts(packed_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    from signbit.cli import main

    model = str(packed_dir("llama"))
    for options, words in (
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--context", "100000"], "beyond the model's 256 positions"),
        (["--api-key", ""], "the API key must be"),
        (["--slots", "0"], "0 is not in the range"),
        (["--grace", "-1"], "grace"),
        (["--port", "99999"], "99999"),
    ):
        assert main(["serve", model, "--port", "0", *options]) == 2
        assert words in capsys.readouterr().err
