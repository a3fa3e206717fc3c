"""A server under load: are requests lost, does memory grow, and what do streams cost against ``generate()``?

    python benchmarks/serving_load.py MODEL [--clients 32] [--seconds 300] [--slots 8] [--json FILE]

Starts ``signbit serve`` on a free port of loopback, measures one stream and ``generate()`` in turns, then lets the
clients loose: each sends one request after the other, of random length, half of them streamed, and goes away in the
middle of one in twenty. An answer counts as lost if it does not come, is cut short, or has another number of tokens
than was asked for. Ratios are to one ``generate()`` alone on the same machine. Needs signbit[serve] and httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

SENTENCE = "the ferryman counted boats on a cold river while nobody asked why the old bridge had been closed again"
WORDS = SENTENCE.split()
TOKENS = 48
LEAVERS = 0.05
ROUNDS = 5


@dataclass
class Tally:
    finished: int = 0
    left: int = 0
    refused: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)


def prompt(words: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(words))


def answer_with_generate(model: str) -> None:
    """A process that measures ``generate()`` once for each line it is sent: the seconds of one token, and of TOKENS."""
    import torch

    from signbit import inference

    opened, tokenizer = inference.open_model(model, device="cpu")
    ids = torch.tensor([tokenizer(SENTENCE)["input_ids"]])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    print("ready", flush=True)
    with torch.inference_mode():
        for _ in sys.stdin:
            seconds = []
            for count in (1, TOKENS):
                started = time.perf_counter()
                opened.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
                seconds.append(time.perf_counter() - started)
            print(json.dumps(seconds), flush=True)


async def in_turns(client: httpx.AsyncClient, model: str, name: str) -> dict[str, Any]:
    """One stream and ``generate()``, one after the other, so that both meet the machine in the same state."""
    other = subprocess.Popen(
        [sys.executable, __file__, model, "--only-generate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert other.stdin is not None and other.stdout is not None
    while "ready" not in (line := other.stdout.readline()):
        if not line:
            raise SystemExit("generate() does not run: try signbit generate")
    body = {"model": name, "prompt": SENTENCE, "max_tokens": TOKENS, "temperature": 0}
    rounds = []
    for _ in range(ROUNDS + 1):
        other.stdin.write("\n")
        other.stdin.flush()
        first, whole = json.loads(other.stdout.readline())
        found = await stream(client, body)
        speed = found["usage"]["completion_tokens"] / found["seconds"]
        rounds.append((first, TOKENS / whole, found["first"], speed))
    other.stdin.close()
    other.wait()
    first, speed, stream_first, stream_speed = (median(values) for values in zip(*rounds[1:], strict=True))
    return {
        "generate": {"first_token_seconds": first, "tokens_per_second": speed},
        "one_stream": {"first_token_seconds": stream_first, "tokens_per_second": stream_speed},
        "first_token_ratio": stream_first / first,
        "throughput_ratio": stream_speed / speed,
    }


def start_server(model: str, slots: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "signbit", "serve", model, "--port", "0", "--slots", str(slots), "--device", "cpu"]
    server = subprocess.Popen(command, stderr=log.open("wb"))
    for _ in range(600):
        found = re.search(r"http://[^ ]+:\d+", log.read_text())
        if found:
            return server, found[0]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


async def stream(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None) -> dict[str, Any]:
    """One streamed completion: its usage, time to the first text, and seconds. A chunk may hold no text of its own."""
    started, first, used, done, finish = time.perf_counter(), None, None, False, None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return {"status": response.status_code, "retry": response.headers.get("Retry-After")}
        chunks = 0
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                first = first or time.perf_counter() - started
                chunks += 1
                used = event.get("usage") or used
                finish = event["choices"][0]["finish_reason"] or finish if event.get("choices") else finish
                if leave_after is not None and chunks > leave_after:
                    return {"status": "left"}
    ended = time.perf_counter() - started
    return {"status": 200, "usage": used, "first": first, "seconds": ended, "whole": done, "finish": finish}


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return {"status": response.status_code, "retry": response.headers.get("Retry-After")}
    answer = response.json()
    ended = time.perf_counter() - started
    finish = answer["choices"][0]["finish_reason"]
    return {"status": 200, "usage": answer["usage"], "first": None, "seconds": ended, "whole": True, "finish": finish}


async def one_client(client: httpx.AsyncClient, model: str, longest: int, until: float, tally: Tally) -> None:
    while time.monotonic() < until:
        most = random.randint(4, 64)
        body = {"model": model, "prompt": prompt(random.randint(2, longest)), "max_tokens": most}
        try:
            if random.random() < LEAVERS:
                found = await stream(client, body, leave_after=2)
            else:
                found = await (stream if random.random() < 0.5 else whole)(client, body)
        except (httpx.HTTPError, ValueError) as error:
            tally.lost[type(error).__name__] += 1
            continue
        if found["status"] == 429:
            tally.refused += 1
            await asyncio.sleep(float(found["retry"] or 1))
        elif found["status"] == "left":
            tally.left += 1
        elif found["status"] != 200:
            tally.lost[f"status {found['status']}"] += 1
        elif not found["whole"] or (found["finish"] != "stop" and found["usage"]["completion_tokens"] != most):
            tally.lost["cut short"] += 1
        else:
            tally.finished += 1
            tally.tokens += found["usage"]["completion_tokens"]
            tally.seconds.append(found["seconds"])
            tally.first += [found["first"]] if found["first"] else []


async def watch_memory(client: httpx.AsyncClient, started: float, tally: Tally) -> None:
    while True:
        page = (await client.get("/metrics")).text
        resident = re.search(r"^process_resident_memory_bytes (\S+)", page, re.M)
        if resident:
            tally.memory.append((time.monotonic() - started, float(resident[1]) / 2**20))
        await asyncio.sleep(2)


async def load(url: str, given: str, clients: int, seconds: float) -> tuple[dict[str, Any], Tally]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        card = (await client.get("/v1/models")).json()["data"][0]
        model, longest = card["id"], min(120, (card["max_model_len"] - 64) // 6)
        alone = await in_turns(client, given, model)
        tally, started = Tally(), time.monotonic()
        watching = asyncio.create_task(watch_memory(client, started, tally))
        await asyncio.gather(*(one_client(client, model, longest, started + seconds, tally) for _ in range(clients)))
        tally.memory.append((time.monotonic() - started, tally.memory[-1][1]))
        watching.cancel()
        for _ in range(50):  # slots are freed between steps
            idle = re.search(r"^signbit_active_sequences (\S+)", (await client.get("/metrics")).text, re.M)
            if idle and not float(idle[1]):
                break
            await asyncio.sleep(0.2)
        else:
            tally.lost["slots still taken at the end"] += 1
    return alone, tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-generate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_generate:
        answer_with_generate(options.model)
        return
    random.seed(0)
    log = Path(tempfile.gettempdir()) / f"serving_load-{os.getpid()}.log"
    server, url = start_server(options.model, options.slots, log)
    try:
        alone, tally = asyncio.run(load(url, options.model, options.clients, options.seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    seconds = tally.memory[-1][0]
    settled = [size for at, size in tally.memory if at >= 0.1 * seconds]
    percentiles = quantiles(tally.seconds, n=100)
    throughput = tally.tokens / seconds
    result = {
        **alone,
        "load": {
            "clients": options.clients,
            "seconds": seconds,
            "finished": tally.finished,
            "lost": dict(tally.lost),
            "went_away": tally.left,
            "refused_429": tally.refused,
            "tokens_per_second": throughput,
            "throughput_ratio": throughput / alone["generate"]["tokens_per_second"],
            "latency_seconds": {"p50": percentiles[49], "p90": percentiles[89], "p99": percentiles[98]},
            "first_token_seconds": median(tally.first),
            "memory_mib": {"after_a_tenth": settled[0], "end": settled[-1], "largest": max(settled)},
        },
        "exit_status": status,
        "server_said": [line for line in log.read_text().splitlines() if "Traceback" in line or "rror" in line],
    }
    log.unlink()
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
