"""How long work reports how far it is, without the library ever printing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    def advance(self, steps: int = 1) -> None: ...

    def status(self, text: str) -> None:
        """How it goes, beside how far it is; shown until the next."""
        ...


class Progress(Protocol):
    def task(self, description: str, total: int) -> AbstractContextManager[Task]:
        """A context in which ``total`` steps are done."""
        ...

    def note(self, message: str) -> None:
        """Something a user should know now."""
        ...


class _Nothing:
    def advance(self, steps: int = 1) -> None:
        pass

    def status(self, text: str) -> None:
        pass


class Silent:
    """Reports nothing: what the Python API does unless told otherwise."""

    def task(self, description: str, total: int) -> AbstractContextManager[Task]:
        return nullcontext(_Nothing())

    def note(self, message: str) -> None:
        pass
