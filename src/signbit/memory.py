"""Giving memory that is no longer used back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_free_memory() -> None:
    """Have the C library return what was freed.

    glibc keeps freed memory for itself, in pieces that the next block's tensors seldom fit into; over many blocks that
    adds up to what looks like a leak. Other systems do better by themselves.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from other C libraries
        if trim is not None:
            trim(0)
