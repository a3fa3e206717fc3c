"""What a kernel that rounds columns in turn is given (methods/rounding.py), and where its result goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Turns:
    """k columns of n rows, all [k, n] contiguous and float32 where nothing else is said.

    shares: [k, k] or None; before: or None. tables: [Z, L, n], or [Z, 2, n] if ``even``; counts: int32 [Z]; which:
    int32 [k, n or 1]. ``places``, uint8, and ``changes`` are written.
    """

    targets: Tensor
    shares: Tensor | None
    before: Tensor | None
    tables: Tensor
    counts: Tensor
    even: bool
    which: Tensor
    places: Tensor
    changes: Tensor

    @property
    def which_strides(self) -> tuple[int, int]:
        """Of columns and of rows."""
        return self.which.stride(0), self.which.stride(1) if self.which.shape[1] > 1 else 0
