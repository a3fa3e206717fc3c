"""What another type makes of matrices: how many it holds exactly, and how far it is from the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class _Sums:
    matrices: int = 0
    exact: int = 0
    squares: float = 0.0
    errors: float = 0.0


@dataclass
class Rounding:
    """Sums over matrices, by the name of the type that they are written in."""

    _types: dict[str, _Sums] = field(default_factory=dict)

    def count(self, kind: str, exact: Tensor, written: Tensor) -> None:
        sums = self._types.setdefault(kind, _Sums())
        exact = exact.float()
        error = float((written.float() - exact).double().square().sum())
        sums.matrices += 1
        sums.exact += error == 0
        sums.errors += error
        sums.squares += float(exact.double().square().sum())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Type -> how many matrices, how many of them exact, and the relative error of all (root of mean squares)."""
        return {
            kind: {
                "matrices": sums.matrices,
                "exact": sums.exact,
                "relative_error": math.sqrt(sums.errors / sums.squares) if sums.squares else 0.0,
            }
            for kind, sums in self._types.items()
        }
