"""Which packed matrices a type of GGUF holds exactly, and the bytes that they become there.

llama.cpp's types are rows of blocks, each with a float16 scale d of its own:

    Q1_0   128 columns, 18 bytes   d, then a bit a column, least significant first: 1 is +d, 0 is -d
    Q4_0    32 columns, 18 bytes   d, then 16 bytes: column j in the low half of byte j, j + 16 in the high; (q - 8) d
    Q8_0    32 columns, 34 bytes   d, then 32 signed bytes: q d

One plane of signs with scales of rows, or of groups of whole blocks, is Q1_0: bits flipped (ours are 1 for negative),
scales repeated. Integers are q - z, small signed numbers, times a scale: Q4_0 where they have 4 bits and the middle for
their zero point, and otherwise Q8_0, which takes 8 bits for them. Nothing else that signbit stores is a scale times a
number of one of these widths: means, scales of columns, second planes and salient weights have no place in a block.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from signbit.layouts import Integers, Layout, SignPlanes
from signbit.layouts.base import spread
from signbit.layouts.fields import unpack_fields
from signbit.layouts.integers import middle

_SIGN_BLOCK, _INTEGER_BLOCK = 128, 32


def exact_type(layout: Layout) -> Type | str:
    """The smallest type that holds ``layout`` exactly, or why there is none."""
    if isinstance(layout, SignPlanes):
        spec = layout.spec
        if spec.planes > 1:
            return f"{spec.planes} planes of signs are added up, and Q1_0 has one"
        if spec.mean:
            return "its groups have means, and Q1_0 has none"
        if spec.column_scales:
            return "its columns have scales, and Q1_0 has none"
        return _misfit(layout, layout.scales, spec.group_size, _SIGN_BLOCK, "Q1_0") or Type.Q1_0
    if isinstance(layout, Integers):
        fits_four = layout.spec.bits == 4 and not layout.spec.zeros
        kind = Type.Q4_0 if fits_four else Type.Q8_0
        if layout.spec.bits == 8 and layout.spec.zeros:
            return "8 bits with zero points make numbers of 9 bits, and Q8_0 has 8"
        return _misfit(layout, layout.scales, layout.spec.group_size, _INTEGER_BLOCK, kind.name) or kind
    return f"no type of GGUF is made of what the layout {layout.kind} is made of"


def _misfit(layout: Layout, scales: Tensor, group_size: int, block: int, name: str) -> str | None:
    """Why blocks of one float16 scale each do not fit columns and scales; None if they do."""
    columns = layout.shape[1]
    if columns % block:
        return f"{columns} columns are not whole blocks of {block}, of which {name} is made"
    if group_size % block and group_size < columns:
        return f"groups of {group_size} columns are not whole blocks of {block}, of which {name} is made"
    if not torch.equal(scales.half().float(), scales.float()):
        return f"its bfloat16 scales do not fit float16, which {name} has"
    return None


def exact_bytes(layout: Layout, kind: Type) -> NDArray[np.uint8]:
    """The rows of a matrix for which :func:`exact_type` said ``kind``, as bytes ``[n, bytes in a row]``."""
    n, m = layout.shape
    if isinstance(layout, SignPlanes):
        positive = layout.signs[0].bitwise_not().view(n, -1, _SIGN_BLOCK // 8)
        return _blocks(layout.scales[0], layout.spec.group_size, m, _SIGN_BLOCK, positive)
    assert isinstance(layout, Integers)
    width = layout.spec.bits
    codes = unpack_fields(layout.codes, m, width).int()
    if kind == Type.Q4_0:
        halves = codes.view(n, -1, 2, _INTEGER_BLOCK // 2)
        body = halves[:, :, 0] | halves[:, :, 1] << 4
    else:
        zeros: Tensor | int = middle(width)
        if layout.spec.zeros:
            stored = unpack_fields(layout.get_buffer("zeros"), layout.scales.shape[1], width)
            zeros = spread(stored, layout.spec.group_size, m).int()
        body = (codes - zeros).view(n, -1, _INTEGER_BLOCK) & 255
    return _blocks(layout.scales, layout.spec.group_size, m, _INTEGER_BLOCK, body.to(torch.uint8))


def _blocks(scales: Tensor, group_size: int, columns: int, block: int, body: Tensor) -> NDArray[np.uint8]:
    """Each block's scale before its ``body`` [n, blocks, bytes]."""
    own = spread(scales, group_size, columns)[:, ::block].half().reshape(-1)
    head = own.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(*body.shape[:2], 2)
    return torch.cat([head, body], -1).flatten(1).numpy()
