"""The column sweep: quantize a matrix group by group, and let the columns still to come make up for the error.

With H^-1 = U^T U (see calibration/hessian.py), a group b of columns that was changed from W_b to Q_b is best
compensated by the columns after it, without touching those before, by

    W_rest -= E U_b,rest          E = (W_b - Q_b) U_bb^-1                               (block)

which is GPTQ's update (arXiv 2210.17323) for a whole group at once. Ways to obtain E:

    none       nothing is fed back
    diagonal   U_bb is replaced by its diagonal: what the released code of BiLLM, STBLLM, ARB-LLM and HBLLM does
    block      the exact formula above; U^-1 is at hand, so it is one small matrix product
    column     GPTQ proper: the group's codebook is fitted from the group's weights at entry and frozen, then its
               columns are quantized one by one, each passing its error on to the next ones inside the group too
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.methods.options import Feedback
from signbit.timing import phase

# Columns between two updates of the rest of the matrix in a column-by-column sweep (GPTQ's lazy batch).
LAZY_COLUMNS = 128


class GroupCode(Protocol):
    """The decision for one group of columns."""

    def values(self) -> Tensor:
        """What the layout will dequantize to, float32 [n, k]."""
        ...

    def assign(self, column: int, weights: Tensor) -> Tensor:
        """Choose anew the signs of one column for these weights [n], codebook frozen; its new values [n]."""
        ...


Code = TypeVar("Code", bound=GroupCode)


def sweep(
    weight: Tensor,
    factor: Factor | None,
    group_size: int,
    quantize_group: Callable[[Tensor, slice], Code],
    feedback: Feedback,
) -> list[Code]:
    """Quantize ``weight`` [n, m] in groups of columns, left to right.

    ``quantize_group(weights [n, k], columns)`` decides on one group; ``columns`` says where it stands in the matrix.
    """
    m = weight.shape[1]
    size = group_size or m
    weight = weight.clone()
    if factor is None:
        feedback = "none"
    else:
        weight[:, factor.dead] = 0
    codes = []
    for start in range(0, m, size):
        columns = slice(start, min(start + size, m))
        code = quantize_group(weight[:, columns], columns)
        codes.append(code)
        with phase("sweep"):
            if factor is not None and feedback == "column":
                _column_feedback(weight, factor.upper, columns, code)
            elif factor is not None and feedback != "none" and columns.stop < m:
                error = weight[:, columns] - code.values()
                if feedback == "diagonal":
                    error /= factor.upper.diagonal()[columns]
                else:
                    error = error @ factor.inverse[columns, columns]
                weight[:, columns.stop :] -= error @ factor.upper[columns, columns.stop :]
    return codes


def _column_feedback(weight: Tensor, upper: Tensor, columns: slice, code: GroupCode) -> None:
    """Quantize the columns of one group one by one, updating ``weight`` in place."""
    for start in range(columns.start, columns.stop, LAZY_COLUMNS):
        stop = min(start + LAZY_COLUMNS, columns.stop)
        batch = weight[:, start:stop].T.contiguous()
        errors = torch.empty_like(batch)
        within = upper[start:stop, start:stop]
        for i in range(stop - start):
            quantized = code.assign(start + i - columns.start, batch[i])
            errors[i] = (batch[i] - quantized) / within[i, i]
            batch[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
        weight[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
