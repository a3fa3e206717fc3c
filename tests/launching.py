"""Several processes of signbit, by torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def launch(processes: int, *program: str) -> subprocess.Popen[str]:
    """Each on one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([*launcher, *program], text=True, stderr=subprocess.PIPE, env=environment)


def process_of(launcher: int, rank: int) -> int:
    """The process that has this rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if re.search(rf"(^|\0)RANK={rank}\0", Path(f"/proc/{child}/environ").read_text()):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")
