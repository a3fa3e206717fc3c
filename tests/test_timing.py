import time
from collections.abc import Iterator

import pytest

from signbit.timing import Stopwatch, elsewhere, phase


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", fake)
        yield fake


def test_nested_phases_count_only_their_own_time(clock: Clock) -> None:
    stopwatch = Stopwatch()
    with stopwatch.running(), phase("outer"):
        clock.wait(1)
        with phase("inner"):
            clock.wait(10)
            with phase("innermost"):
                clock.wait(100)
            clock.wait(20)
        clock.wait(2)
        with phase("inner"):
            clock.wait(40)
    assert stopwatch.seconds == {"outer": 3, "inner": 70, "innermost": 100}


def test_a_phase_inside_itself_is_counted_once(clock: Clock) -> None:
    stopwatch = Stopwatch()
    with stopwatch.running(), phase("a"):
        clock.wait(1)
        with phase("a"):
            clock.wait(2)
    assert stopwatch.seconds == {"a": 3}


def test_time_between_phases_is_nobodys(clock: Clock) -> None:
    stopwatch = Stopwatch()
    with stopwatch.running():
        clock.wait(5)
        with phase("a"):
            clock.wait(1)
        clock.wait(5)
        with phase("b"):
            clock.wait(2)
    assert stopwatch.seconds == {"a": 1, "b": 2}


def test_a_phase_that_fails_is_counted_and_left(clock: Clock) -> None:
    stopwatch = Stopwatch()
    with stopwatch.running(), phase("outer"):
        with pytest.raises(RuntimeError), phase("inner"):
            clock.wait(1)
            raise RuntimeError
        clock.wait(2)
    assert stopwatch.seconds == {"inner": 1, "outer": 2}


def test_without_a_running_stopwatch_nothing_is_counted(clock: Clock) -> None:
    stopwatch = Stopwatch()
    with phase("a"):
        clock.wait(1)
    with stopwatch.running():
        pass
    with phase("a"):
        clock.wait(1)
    assert stopwatch.seconds == {}


def test_the_innermost_running_stopwatch_counts(clock: Clock) -> None:
    first, second = Stopwatch(), Stopwatch()
    with first.running():
        with second.running(), phase("a"):
            clock.wait(1)
        with phase("b"):
            clock.wait(2)
    assert (first.seconds, second.seconds) == ({"b": 2}, {"a": 1})


def test_time_spent_elsewhere_is_shared_out(clock: Clock) -> None:
    stopwatch, threads = Stopwatch(), [Stopwatch(), Stopwatch()]
    with stopwatch.running(), phase("outer"):
        clock.wait(1)
        with elsewhere(threads):
            clock.wait(10)
            threads[0].seconds |= {"a": 6, "b": 2}
            threads[1].seconds |= {"a": 9, "c": 3}
        clock.wait(2)
    assert stopwatch.seconds == {"outer": 3, "a": 7.5, "b": 1, "c": 1.5}


def test_nobody_waits_for_threads_that_count_nothing(clock: Clock) -> None:
    with Stopwatch().running() as stopwatch, phase("outer"), elsewhere([Stopwatch()]):
        clock.wait(1)
    assert stopwatch.seconds == {"outer": 0}
