import threading
import time
from collections.abc import Iterator

import pytest
import torch

from signbit.parallel import side_by_side
from signbit.timing import Stopwatch, phase

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_tasks() -> None:
    assert side_by_side([lambda i=i: i for i in range(9)], CPU) == list(range(9))  # type: ignore[misc]
    assert side_by_side([], CPU) == []


def test_tasks_share_the_threads_there_are(threads: int) -> None:
    found = side_by_side([torch.get_num_threads] * 2, CPU)
    assert found == [max(1, threads // 2)] * 2
    assert torch.get_num_threads() == threads
    late = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [threads]


def test_two_tasks_are_at_work_at_once(threads: int) -> None:
    if threads == 1:
        pytest.skip("one thread does one task after the other")
    meeting = threading.Barrier(2, timeout=20)
    assert sorted(side_by_side([meeting.wait] * 2, CPU)) == [0, 1]


def test_no_more_than_four_are_at_work_at_once() -> None:
    """Each has a matrix and its Hessian's factor in memory."""
    torch.set_num_threads(8)
    at_work, most = 0, 0
    lock = threading.Lock()

    def task() -> int:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        with lock:
            at_work -= 1
        return torch.get_num_threads()

    assert side_by_side([task] * 8, CPU) == [2] * 8
    assert most <= 4


def test_no_task_builds_a_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not any(y.requires_grad for y in side_by_side([lambda: x * 2] * 3, CPU))


def test_the_first_error_is_raised_when_all_have_ended(threads: int) -> None:
    done = []

    def fail(message: str) -> None:
        raise ValueError(message)

    with pytest.raises(ValueError, match="first"):
        side_by_side([lambda: fail("first"), lambda: fail("second"), lambda: done.append(1)], CPU)
    assert done == ([1] if threads > 1 else [])
    assert torch.get_num_threads() == threads


def test_phases_of_the_tasks_add_up_to_the_time_waited() -> None:
    def task() -> None:
        with phase("product"):
            torch.randn(200, 200) @ torch.randn(200, 200)

    with Stopwatch().running() as stopwatch, stopwatch.phase("all"):
        side_by_side([task] * 4, CPU)
    assert set(stopwatch.seconds) <= {"all", "product", "other"}
    assert stopwatch.seconds["product"] > 0
