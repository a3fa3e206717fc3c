"""Packed integers of 1 to 8 bits, rows of them as bytes.

A number of bits that does not divide a byte is stored in parts that do: 3 = 2 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1, the widest
part holding the lowest bits. Each part of a row of ``m`` integers is a run of m fields of w bits, the first in the
lowest bits of the first byte, padded with zeros to whole 32-bit words; a row is its parts one after the other. So every
integer takes exactly its bits, nothing straddles a byte, and a row is one run of bytes that can be looked up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.layouts.bits import packed_width

# Bytes in a word of 8 / w unpacked fields of w bits, and the dtype to look such words up in.
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}


def field_widths(bits: int) -> list[int]:
    """The widths of the parts of an integer, lowest bits first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that a row of ``count`` integers of ``bits`` bits takes."""
    return sum(packed_width(count * width) for width in field_widths(bits))


def pack_fields(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``[..., m]``, each below 2^bits, into uint8 ``[..., packed_bytes(m, bits)]``."""
    count = values.shape[-1]
    parts, shift = [], 0
    for width in field_widths(bits):
        per_byte = 8 // width
        part = (values >> shift) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, packed_width(count * width) * per_byte - count))
        # Strided slices put together: no intermediate is wider than a byte an integer.
        packed = part[..., 0::per_byte].clone()
        for place in range(1, per_byte):
            packed |= part[..., place::per_byte] << (place * width)
        parts.append(packed)
        shift += width
    return torch.cat(parts, dim=-1)


def unpack_fields(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first ``count`` integers of each row, as uint8 ``[..., count]``."""
    values, start, shift = None, 0, 0
    for width in field_widths(bits):
        stop = start + packed_width(count * width)
        part = _unpack_width(packed[..., start:stop], width)[..., :count]
        values = part if values is None else values | (part << shift)
        start, shift = stop, shift + width
    assert values is not None
    return values


def _unpack_width(packed: Tensor, width: int) -> Tensor:
    """Bytes ``[..., w]`` as uint8 fields ``[..., 8 w / width]``: a table of all 256 bytes, looked up."""
    if width == 8:
        return packed
    shifts = torch.arange(0, 8, width, device=packed.device)
    table = ((torch.arange(256, device=packed.device).unsqueeze(1) >> shifts) & (2**width - 1)).to(torch.uint8)
    # A byte's fields are one word: looking up words is many times faster than rows of bytes.
    words = table.view(_WORDS[width]).squeeze(1).index_select(0, packed.flatten().int())
    return words.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] * 8 // width)
