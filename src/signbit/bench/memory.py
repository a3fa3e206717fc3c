"""What memory this process takes, by what it is made of."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")
_FIELDS = {"Rss:": "resident", "Pss:": "shared_out", "Anonymous:": "anonymous"}


@dataclass(frozen=True)
class Memory:
    """Bytes.

    resident: all that is in memory. anonymous: of it, what is the process's own and would have to go to swap; the rest
    is files that are mapped, which the system may drop and read again. shared_out: resident, with what other processes
    have mapped too divided among them.
    """

    resident: int
    shared_out: int
    anonymous: int

    @property
    def files(self) -> int:
        return self.resident - self.anonymous

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "files": self.files}


def memory() -> Memory | None:
    """Now; None where the system does not tell (only Linux does, in this detail)."""
    if not sys.platform.startswith("linux") or not _ROLLUP.is_file():
        return None
    lines = [line.split() for line in _ROLLUP.read_text(encoding="ascii").splitlines()]
    found = {_FIELDS[line[0]]: int(line[1]) << 10 for line in lines if line[0] in _FIELDS}
    return Memory(**found)
