"""Multiplying with packed weights. The torch reference is the truth that every faster kernel is tested against."""

from signbit.kernels.reference import matmul

__all__ = ["matmul"]
