"""The column sweep: quantize a matrix group by group, and let the columns still to come make up for the error.

With H^-1 = U^T U (see calibration/hessian.py), a group b of columns that was changed from W_b to Q_b is best
compensated by the columns after it, without touching those before, by

    W_rest -= E U_b,rest          E = (W_b - Q_b) U_bb^-1                               (block)

which is GPTQ's update (arXiv 2210.17323) for a whole group at once. All of U would take inverting all of R = U^-1.
It is not needed: let X = E U be what all that was passed on amounts to, with E zero from group b on. Then X R = E, so

    X_b = -(X_a R_ab) U_bb      summed over the groups a before b

is what group b receives, and U_bb is the inverse of R_bb alone. Ways to obtain E:

    none       nothing is fed back
    diagonal   U_bb is replaced by its diagonal: what the released code of BiLLM, STBLLM, ARB-LLM and HBLLM does
    block      the exact formula above: R is at hand, so it is one small matrix product
    column     GPTQ proper: the group's coefficients are fitted from the group's weights at entry and frozen, then its
               columns are quantized one by one, each passing its error on to the next ones inside the group too

What is left of the error when the columns to come have done their best is |E|^2 = tr(D M D^T) with D = W_b - Q_b and
M = U_bb^-1 U_bb^-T. ``refits`` fits the group's coefficients again by least squares in that metric, given the choices
made, and makes the choices anew, so many times. ``passes`` goes over the finished matrix again (descent.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.methods.descent import descend, least_squares
from signbit.methods.options import SweepOptions
from signbit.methods.rounding import Choosing, round_in_turn
from signbit.timing import phase


class GroupValues(Protocol):
    """The decision for one group of columns."""

    def values(self) -> Tensor:
        """What the layout will dequantize to, float32 [n, k]."""
        ...


class GroupCode(GroupValues, Choosing, Protocol):
    """A decision that can be looked at again: a choice for each weight, whose values are to the bit (but for the
    rounding of even steps) what :meth:`values` says, and coefficients for each row, in which the values are linear.
    ``feedback: column``, ``refits`` and ``passes`` need one."""

    def features(self) -> Tensor:
        """Float32 [F, n, k]: the values are the sum over F of coefficient [F, n] times feature."""
        ...

    def set_coefficients(self, coefficients: Tensor) -> None:
        """Take these [F, n], rounded to storage dtype, in place of those there are.

        Scales may come out negative: then take their size, and turn the signs that they stand before.
        """
        ...


Code = TypeVar("Code", bound=GroupValues)


def sweep(
    weight: Tensor,
    factor: Factor | None,
    group_size: int,
    quantize_group: Callable[[Tensor, slice], Code],
    options: SweepOptions | None,
) -> list[Code]:
    """Quantize ``weight`` [n, m] in groups of columns, left to right; without factor or options each by itself.

    ``quantize_group(weights [n, k], columns)`` decides on one group; ``columns`` says where it stands in the matrix.
    """
    m = weight.shape[1]
    groups = groups_of(m, group_size)
    if factor is None or options is None:
        return [quantize_group(weight[:, columns], columns) for columns in groups]
    weight = weight * ~factor.dead
    passed_on = torch.zeros_like(weight)  # X
    codes = []
    for columns in groups:
        own, before = weight[:, columns], slice(0, columns.start)
        if options.feedback == "none":
            codes.append(quantize_group(own, columns))
            continue
        with phase("sweep"):
            upper, root = factor.upper(columns), factor.root[columns, columns]
            received = (passed_on[:, before] @ factor.root[before, columns]).neg_() @ upper
            own = own - received
        code = quantize_group(own, columns)
        codes.append(code)
        with phase("sweep"):
            error = _group_error(own, upper, root, code, options)
            if columns.stop < m:
                passed_on[:, columns] = received.addmm_(error, upper)
    if options.passes:
        with phase("descent"):
            descend(weight, factor, groups, cast(list[GroupCode], codes), options.passes)
    return codes


def groups_of(columns: int, group_size: int) -> list[slice]:
    """The groups of a matrix with this many columns; a size of 0 is the whole row."""
    size = group_size or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def _group_error(weight: Tensor, upper: Tensor, root: Tensor, code: GroupValues, options: SweepOptions) -> Tensor:
    """Settle choices and coefficients of one group with weights [n, k], in turns; the error E that it passes on.

    upper, root: U_bb and R_bb, [k, k].
    """
    by_column = options.feedback == "column"
    error = _quantize_columns(weight, upper, cast(GroupCode, code)) if by_column else None
    if options.refits:
        metric = root @ root.T
        product = weight @ metric
    for _ in range(options.refits):
        settled = cast(GroupCode, code)
        settled.set_coefficients(least_squares(settled.features(), product, metric))
        if by_column:
            error = _quantize_columns(weight, upper, settled)
        else:
            round_in_turn(settled, weight.T)
    if error is not None:
        return error
    difference = weight - code.values()
    return difference / upper.diagonal() if options.feedback == "diagonal" else difference @ root


def _quantize_columns(weight: Tensor, upper: Tensor, code: GroupCode) -> Tensor:
    """Quantize the columns of one group [n, k] one by one, each passing its error on to those after it; the error E."""
    diagonal = upper.diagonal().unsqueeze(1)
    # Column j takes U_ij / U_ii of the change of column i.
    changes = round_in_turn(code, weight.T, (upper / diagonal).triu(1).T)
    # What this adds up to is (W - Q) U^-1, the formula for a block.
    return changes.div_(-diagonal).T
