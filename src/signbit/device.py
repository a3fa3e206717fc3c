"""Choosing where to compute."""

from __future__ import annotations

import torch

from signbit.errors import SignbitError


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise SignbitError(f"unknown device {name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SignbitError("device cuda was asked for, but torch finds no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
