"""Where the time of a run goes, phase by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Stopwatch:
    """Seconds by phase. Phases nest, and each counts only its own time, so the figures add up to the whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def running(self) -> Iterator[Stopwatch]:
        """Make this the stopwatch that :func:`phase` reports to."""
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)

    @contextmanager
    def elsewhere(self, others: Sequence[Stopwatch]) -> Iterator[None]:
        """The body waits for threads with these stopwatches: count its time as theirs, in the proportions of theirs."""
        self._switch()
        started = self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()
            whole = sum(sum(other.seconds.values()) for other in others) or 1.0
            for other in others:
                for name, seconds in other.seconds.items():
                    self.seconds[name] += (self._since - started) * seconds / whole

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()


_active: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time of the body as ``name`` on the running stopwatch, if there is one."""
    stopwatch = _active.get()
    if stopwatch is None:
        yield
    else:
        with stopwatch.phase(name):
            yield


@contextmanager
def elsewhere(others: Sequence[Stopwatch]) -> Iterator[None]:
    """:meth:`Stopwatch.elsewhere` of the running stopwatch, if there is one."""
    stopwatch = _active.get()
    if stopwatch is None:
        yield
    else:
        with stopwatch.elsewhere(others):
            yield
