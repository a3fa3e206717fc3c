"""Several processes that do one piece of work together: who is who, and what they tell each other.

Accelerate's PartialState opens the process group: it knows the launchers, picks NCCL or gloo and gives each process its
device. All processes go through the same program and reach the same calls of :class:`Processes` in the same order, on
values that may differ. Files are shared: what the first process has written, the others read.

A process that fails says why and ends. The others learn of it by the connection that it closes, or from the launcher,
which ends them (cli); no call waits for one that is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from signbit.device import choose_device
from signbit.errors import SignbitError
from signbit.timing import phase

T = TypeVar("T")

# The first process may write a text for hours while the others wait for it.
_PATIENCE = timedelta(days=7)
LEFT_ALONE = "stopped, as another process of this run has ended; --resume goes on from what is finished"


def is_first_process() -> bool:
    """Whether this is the one process that speaks."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether a launcher such as torchrun has started this process along with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Processes:
    """The processes of this run; one, unless a launcher started more.

    Raises SignbitError, from any call, where another process has ended.
    """

    def __init__(self, device: str) -> None:
        self.device = choose_device(device)
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            with _talking():
                state = PartialState(cpu=self.device.type == "cpu", timeout=_PATIENCE)
            self.device, self.rank = state.device, state.process_index

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on the first process while the others wait; what it returns, in all of them."""
        if self.count == 1:
            return work()
        told: list[object] = [False, None]
        try:
            if self.is_first:
                told = [True, work()]
        finally:
            with _talking():
                distributed.broadcast_object_list(told, 0)
        if not told[0]:
            raise SignbitError("stopped, as the first process was by an error that it names")
        return cast(T, told[1])

    def tell(self, value: T) -> list[T]:
        """Each process's ``value``, which must survive pickling, in all of them."""
        if self.count == 1:
            return [value]
        told: list[object] = [None] * self.count
        with _talking():
            distributed.all_gather_object(told, value)
        return cast(list[T], told)

    def add(self, values: Tensor, to: int | None = None) -> None:
        """Make ``values`` the sum of each process's; with ``to`` only that one's, and no other may use its own then.

        The order of a sum follows from the number of processes, so that a run can be repeated.
        """
        if self.count > 1:
            with _talking():
                if to is None:
                    distributed.all_reduce(values)
                else:
                    distributed.reduce(values, to)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make each parameter's gradient the sum of all processes'; none where none has one."""
        parameters = list(parameters)
        if self.count == 1 or not parameters:
            return
        used = torch.tensor([one.grad is not None for one in parameters], dtype=torch.float32, device=self.device)
        self.add(used)
        for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.add(parameter.grad)

    def mean(self, values: Tensor) -> Tensor:
        """Of each process's ``values``."""
        self.add(values)
        return values / self.count

    def gather(self, values: Tensor) -> Tensor:
        """Each process's ``values`` [...], all of one shape, as [processes, ...]."""
        if self.count == 1:
            return values.unsqueeze(0)
        gathered = [torch.empty_like(values) for _ in range(self.count)]
        with _talking():
            distributed.all_gather(gathered, values)
        return torch.stack(gathered)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        with phase("other processes"):
            yield
    except RuntimeError as error:  # of any kind that torch knows: a closed connection, a timeout, an aborted group
        raise SignbitError(LEFT_ALONE) from error


@contextmanager
def together() -> Iterator[None]:
    """Around what talks by collectives of torch's own, as DDP and FSDP do: a peer that is gone is told as such."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own, but name their source: this is where connections are.
        if isinstance(error, distributed.DistError) or "gloo/transport/" in str(error):
            raise SignbitError(LEFT_ALONE) from error
        raise


def deal(costs: Sequence[float], count: int) -> list[int]:
    """Who of ``count`` takes each piece of work: the costliest first, each to whoever has least to do so far."""
    loads, owners = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(count), key=lambda one: (loads[one], one))
        loads[owners[i]] += costs[i]
    return owners
