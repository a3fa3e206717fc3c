"""Where trials run: on this machine, or on a Ray cluster.

Both do the same thing with the same trials, as many at a time as they are told. What is worth keeping is in the trials'
directories, so neither keeps anything, nor tries again: that is the sweep's business, for all kinds of failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from signbit.errors import SignbitError
from signbit.source import first_line
from signbit.sweeping.trial import Outcome, Trial, perform


class Executor(Protocol):
    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Perform trials; each with what came of it, as they end."""
        ...


class LocalExecutor:
    """``jobs`` trials at a time on this machine. Each is a process of its own, which a thread here waits for."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        pool = ThreadPoolExecutor(self._jobs)
        try:
            running = {pool.submit(perform, trial): trial for trial in trials}
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class RayExecutor:
    """On the Ray cluster at ``address``, at most ``jobs`` trials at a time. Its nodes have signbit, and see the same
    files under the same names."""

    def __init__(self, address: str, jobs: int, gpus: float) -> None:
        try:
            import ray
        except ImportError as error:
            raise SignbitError("Ray is not installed: pip install 'signbit[sweep]', or leave out --ray") from error
        self._ray: Any = ray
        self._jobs, self._gpus = jobs, gpus
        if not ray.is_initialized():
            where = {"include_dashboard": False} if address == "here" else {"address": address}
            try:
                ray.init(log_to_driver=False, **where)
            except Exception as error:
                # It has no class of its own for what may go wrong here, and raises plain ones.
                raise SignbitError(f"no Ray cluster at {address!r}: {first_line(error)}") from error

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        waiting = list(reversed(trials))
        running: dict[Any, Trial] = {}
        remote = self._ray.remote(max_retries=0, num_gpus=self._gpus)(perform)
        while waiting or running:
            while waiting and len(running) < self._jobs:
                trial = waiting.pop()
                running[remote.options(num_cpus=trial.cpus).remote(trial)] = trial
            for reference in self._ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(reference), self._outcome(reference)

    def _outcome(self, reference: object) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # a node or a worker is lost
            return Outcome(f"Ray: {first_line(error)}")
        return outcome
