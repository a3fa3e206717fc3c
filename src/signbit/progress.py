"""How long work reports how far it is, without the library ever printing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    def advance(self, steps: int = 1) -> None: ...


class Progress(Protocol):
    def task(self, description: str, total: int) -> _TaskContext:
        """A context in which ``total`` steps are done."""
        ...

    def note(self, message: str) -> None:
        """Something a user should know now."""
        ...


class _TaskContext(Protocol):
    def __enter__(self) -> Task: ...
    def __exit__(self, *exception: object) -> bool | None: ...


class _Nothing:
    def advance(self, steps: int = 1) -> None:
        pass


class Silent:
    """Reports nothing: what the Python API does unless told otherwise."""

    @contextmanager
    def _task(self) -> Iterator[Task]:
        yield _Nothing()

    def task(self, description: str, total: int) -> _TaskContext:
        return self._task()

    def note(self, message: str) -> None:
        pass
