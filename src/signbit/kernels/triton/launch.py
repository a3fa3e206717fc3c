"""How kernels are started: in which form, with which blocks, over which grid.

Grids and constants follow from shapes and specs alone: nothing waits for the device, so that products can be captured
in CUDA graphs. All kernels that take a tile of tokens have the same head and the same tail,

    kernel(x, y, *tensors, tokens, *sizes, <constants>, BLOCK_N, BLOCK_K, BLOCK_T, DOT, PRECISION)

and so have those that unpack rows of W for torch to multiply with,

    unpack(dense, *tensors, first, stop, *sizes, <constants>, BLOCK_N, BLOCK_K)

and everything goes through :func:`start`, which is also where a test compiles instead of running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.tuning import Blocks

# More tokens are multiplied on tensor cores, whose tiles have room for 16.
GEMV_TOKENS = 8

# The tile that a program unpacks. 16 rows are whole strips and whole pairs; 256 columns of bits are a sector of memory.
UNPACK = Blocks(rows=16, columns=256, tokens=16, warps=4, stages=2)

_DOTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def start(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], blocks: Blocks
) -> None:
    kernel[grid](*arguments, **constants, num_warps=blocks.warps, num_stages=blocks.stages)


def start_unpacking(
    kernel: Any,
    into: Tensor,
    first: int,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    constants: dict[str, Any],
    blocks: Blocks = UNPACK,
) -> None:
    """Rows of W from ``first`` on, as many as ``into`` has; ``sizes`` begin with the numbers of rows and columns.

    Programs with neighbouring columns start one after the other, so that what they write is close together, too.
    """
    rows, m = into.shape
    grid = (triton.cdiv(m, blocks.columns), triton.cdiv(rows, blocks.rows))
    tile = {"BLOCK_N": blocks.rows, "BLOCK_K": blocks.columns}
    start(kernel, grid, (into, *tensors, first, first + rows, *sizes), constants | tile, blocks)


@dataclass(frozen=True)
class Form:
    """How one product is computed."""

    tokens: int
    blocks: Blocks
    dot: Any  # Triton's dtype for tl.dot; None for gemv
    precision: str  # of tl.dot in float32

    @classmethod
    def of(cls, x: Tensor, tokens: int, blocks: Blocks, wide: bool, precise: bool) -> Form:
        """``wide``: weights may exceed float16. ``precise``: activations are worth more than the 10 bits of TF32."""
        if tokens <= GEMV_TOKENS:
            return cls(tokens, blocks, None, "ieee")
        dot = torch.float32 if wide and x.dtype == torch.float16 else x.dtype
        return cls(tokens, blocks, _DOTS[dot], "ieee" if precise else "tf32")

    @property
    def token_block(self) -> int:
        return triton.next_power_of_2(self.tokens) if self.dot is None else self.blocks.tokens

    def with_rows(self, rows: int) -> Form:
        return replace(self, blocks=replace(self.blocks, rows=rows))

    def launch(self, kernel: Any, tensors: Sequence[Tensor], sizes: Sequence[int], constants: dict[str, Any]) -> None:
        """``tensors`` begin with x and y, ``sizes`` with the numbers of rows and columns."""
        blocks = self.blocks
        grid = (triton.cdiv(sizes[0], blocks.rows), triton.cdiv(self.tokens, self.token_block))
        shape = {
            "BLOCK_N": blocks.rows,
            "BLOCK_K": blocks.columns,
            "BLOCK_T": self.token_block,
            "DOT": self.dot,
            "PRECISION": self.precision,
        }
        start(kernel, grid, (*tensors, self.tokens, *sizes), constants | shape, blocks)


@dataclass(frozen=True)
class Product:
    """A layout, ready to be multiplied with.

    name: of its row in the table of blocks; wide: whether weights may exceed float16; run(x, y, form): y = x W^T
    for contiguous x [.., m] and y [.., n]. dense(into, first): rows of W from ``first`` on, a multiple of 16, in
    float32 and rounded once to into's dtype; as many as ``into`` has, which are a multiple of 16 or the last ones.
    gemm: whether run takes more than GEMV_TOKENS tokens; it does where there is no dense.
    """

    name: str
    shape: tuple[int, int]
    wide: bool
    run: Callable[[Tensor, Tensor, Form], None]
    dense: Callable[[Tensor, int], None] | None
    gemm: bool = True
