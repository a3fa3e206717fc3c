"""Where this machine keeps what it found out once: compiled kernels, the fastest tiles, answers of evaluations."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``~/.cache/signbit``, or what SIGNBIT_CACHE names."""
    directory = os.environ.get("SIGNBIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "signbit")
    return Path(directory).expanduser()
