"""The thread that owns the model, and the queue before it.

Jobs are begun in the order they came in. A job that wants several texts waits until there are slots for all of them,
and the ones behind it wait with it: nobody is overtaken forever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from signbit.serving.engine import Engine
from signbit.serving.job import Failure, Job

_log = logging.getLogger(__name__)
_STOPPED = Failure("the server is shutting down", "shutting_down")
_FAILED = Failure("the model failed; the server's log says how", "internal_error")


class QueueFullError(Exception):
    """There are as many jobs waiting as are allowed to."""


class ShuttingDownError(Exception):
    """No new jobs are taken."""


class Scheduler:
    """Runs jobs on a thread of its own. queue: how many may wait for a slot.

    ``submit`` and ``cancel`` may be called from any thread; what a job has to tell is told on the scheduler's.
    """

    def __init__(self, engine: Engine, queue: int) -> None:
        self.engine = engine
        self.queue = queue
        self.steps = 0
        self.step_seconds = 0.0
        self.rejected = 0
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="signbit-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs, or none: QueueFullError, ShuttingDownError."""
        with self._changed:
            if self._draining:
                raise ShuttingDownError
            # An idle model takes them at once, so free slots count as places in the queue.
            free = max(self.engine.slots - self.engine.active, 0)
            if len(self._waiting) + len(jobs) > self.queue + free:
                self.rejected += 1
                raise QueueFullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Free what these jobs take: places in the queue at once, slots soon. No matter if they are finished."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more jobs; what is under way or waiting is finished."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """End everything now, and the thread: who still waits is told so."""
        with self._changed:
            self._draining = self._stopped = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._admit():
            began = time.monotonic()
            try:
                self.engine.step()
            except Exception:
                _log.exception("a step failed")
                self.engine.abandon(_FAILED)
            self.steps += 1
            self.step_seconds += time.monotonic() - began
        self.engine.abandon(_STOPPED)
        for job in self._waiting:
            job.tell(0, _STOPPED)
        self._waiting.clear()

    def _admit(self) -> bool:
        """Wait for something to do and hand over what fits; False: it is over."""
        with self._changed:
            while not (self._waiting or self.engine.busy or self._stopped):
                self._changed.wait()
            while self._waiting and self.engine.fits(self._waiting[0]):
                self.engine.add(self._waiting.popleft())
        return not self._stopped
