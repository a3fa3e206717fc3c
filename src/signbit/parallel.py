"""Independent pieces of work side by side on a CPU's threads.

Searches and sweeps are many small operations, each too short for a second thread to be of use. A few matrices at a
time, each with its share of the threads, keep all of them busy; PyTorch lets go of Python's lock inside its operations.
No more than a few, since each at work has its weight and its Hessian's factor in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from signbit.timing import Stopwatch, elsewhere

Result = TypeVar("Result")

# Tasks at work at once, however many threads there are.
_MOST = 4


def side_by_side(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """What each task returns, in order. Tasks run without gradients; they begin in order, so give the longest first.

    If some fail, the first one's error is raised once all have ended. On a GPU, or with one thread, tasks run one after
    the other.
    """
    threads = torch.get_num_threads()
    workers = min(len(tasks), threads, _MOST) if device.type == "cpu" else 1
    if workers < 2:
        return [task() for task in tasks]
    stopwatches = [Stopwatch() for _ in tasks]

    def run(task: Callable[[], Result], stopwatch: Stopwatch) -> Result:
        # Threads begin with gradients, and with as many threads of their own as the process has.
        torch.set_num_threads(threads // workers)
        with torch.no_grad(), stopwatch.running(), stopwatch.phase("other"):
            return task()

    try:
        with elsewhere(stopwatches), ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(run, task, stopwatch) for task, stopwatch in zip(tasks, stopwatches, strict=True)]
        return [future.result() for future in running]
    finally:
        # What a thread sets is also what threads that begin later start with.
        torch.set_num_threads(threads)
