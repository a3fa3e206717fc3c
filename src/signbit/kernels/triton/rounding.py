"""Rounding columns in turn (methods/rounding.py): a program takes a few rows through all columns.

What a row's columns have changed by stays in registers, and a column takes its share of all of it at once: those that
have had no turn yet have not changed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from signbit.kernels.triton.launch import start
from signbit.kernels.triton.tuning import Blocks
from signbit.kernels.turns import Turns

# 128 changes of 32 rows are 32 registers of each thread. Estimated: to be measured.
BLOCKS = Blocks(rows=32, columns=128, tokens=16, warps=4, stages=1)


@triton.jit
def kernel(
    targets, shares, before, tables, counts, which, places, changes, n, turns, levels, which_columns, which_rows,
    SHARES: tl.constexpr, BEFORE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    turn = tl.arange(0, TURNS)
    changed = tl.zeros((TURNS, ROWS), tl.float32)
    for j in range(turns):
        at = j * tl.cast(n, tl.int64) + rows
        target = tl.load(targets + at, inside, other=0.0)
        if SHARES:
            share = tl.load(shares + j * turns + turn, turn < turns, other=0.0)
            target += tl.sum(changed * share[:, None], axis=0)
        table = tl.load(which + j * which_columns + rows * which_rows, inside, other=0)
        count = tl.load(counts + table)
        values = tables + table.to(tl.int64) * levels * n + rows
        low = tl.load(values, inside, other=0.0)
        if EVEN:
            step = tl.load(values + n, inside, other=0.0)
            last = (count - 1).to(tl.float32)
            steps = (target - low) / tl.where(step > 0, step, 1.0)
            steps = tl.where(step > 0, steps, 0.5 * last + tl.where(target < low, -0.5, 0.5))
            steps = tl.where(steps > 0, steps, 0.0)  # not for what is no number
            place = (tl.minimum(steps, last) + 0.5).to(tl.int32)
            value = low + place.to(tl.float32) * step
        else:
            place = tl.zeros((ROWS,), tl.int32)
            value, distance = low, tl.abs(target - low)
            for level in range(1, levels):
                other = tl.load(values + level * tl.cast(n, tl.int64), inside, other=0.0)
                farther = tl.abs(target - other)
                after = (other == value) & (target < value)  # of values alike, the last if they are above
                closer = (level < count) & ((farther < distance) | after)
                place = tl.where(closer, level, place)
                value = tl.where(closer, other, value)
                distance = tl.where(closer, farther, distance)
        if BEFORE:
            change = value - tl.load(before + at, inside, other=0.0)
        else:
            change = value - target
        changed = tl.where(turn[:, None] == j, change[None, :], changed)
        tl.store(changes + at, change, inside)
        tl.store(places + at, place.to(tl.uint8), inside)


def round_in_turn(given: Turns) -> None:
    """As methods/rounding.py has it."""
    turns, n = given.targets.shape
    read = [given.targets if tensor is None else tensor for tensor in (given.targets, given.shares, given.before)]
    tensors = [*read, given.tables, given.counts, given.which, given.places, given.changes]
    sizes = n, turns, given.tables.shape[1], *given.which_strides
    constants: dict[str, bool | int] = {"ROWS": BLOCKS.rows, "TURNS": max(16, triton.next_power_of_2(turns))}
    constants |= {"SHARES": given.shares is not None, "BEFORE": given.before is not None, "EVEN": given.even}
    start(kernel, (triton.cdiv(n, BLOCKS.rows),), (*tensors, *sizes), constants, BLOCKS)
