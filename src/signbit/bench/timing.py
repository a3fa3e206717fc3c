"""Timing things against each other.

A machine that others work on is fast in one second and slow in the next. So what is to be compared takes turns, a few
milliseconds each, and is compared within a turn: the figures are medians of times over all turns, and medians of
ratios of times of the same turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Contestant:
    """One thing to time: calls that do the same work on different memory, gone through in a circle."""

    name: str
    calls: Sequence[Callable[[], object]]
    seconds: list[float] = field(default_factory=list)  # of one call, in each turn
    _next: int = 0
    _count: int = 0

    def turn(self, at_least: float) -> None:
        if not self._count:
            self._count = max(1, round(at_least / self._run(1)))
        self.seconds.append(self._run(self._count))

    def _run(self, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            self.calls[self._next]()
            self._next = (self._next + 1) % len(self.calls)
        return (time.perf_counter() - started) / count

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(contestants: Sequence[Contestant], turns: int, at_least: float) -> None:
    """Each in turn for ``at_least`` seconds, ``turns`` times, after one call that is not counted."""
    for contestant in contestants:
        contestant.calls[0]()
    for _ in range(turns):
        for contestant in contestants:
            contestant.turn(at_least)


def times_faster(one: Contestant, other: Contestant) -> float:
    """How many times faster than ``other`` one is."""
    return statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))
