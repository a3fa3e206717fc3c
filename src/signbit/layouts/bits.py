"""Bit planes: rows of booleans as bytes.

Bits are LSB-first within a byte along the last dimension and rows are padded with zeros to whole 32-bit words, so a
row of ``m`` bits takes ``4 * ceil(m / 32)`` bytes. Both directions work on eight bits at a time: eight booleans are
one little-endian 64-bit word, and one multiplication moves the eight useful bits into (or out of) one byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32

# Byte i of a 64-bit word holds bit i of the packed byte. Multiplying by _GATHER adds up copies of the word shifted so
# that all eight bits meet in the top byte; _SPREAD copies a byte into all eight bytes, where _SELECT keeps bit i of
# byte i. (Signed literals: torch has no unsigned 64-bit arithmetic.)
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)


def packed_width(bits: int) -> int:
    """Bytes that a row of ``bits`` bits takes."""
    return (bits + WORD_BITS - 1) // WORD_BITS * (WORD_BITS // 8)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans ``[..., m]`` into uint8 ``[..., packed_width(m)]``."""
    if bits.dtype != torch.bool:
        raise TypeError(f"pack_bits takes booleans, got {bits.dtype}")
    width = packed_width(bits.shape[-1])
    # Flat, because only then does a view as words not depend on strides.
    words = torch.nn.functional.pad(bits, (0, width * 8 - bits.shape[-1])).reshape(-1).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8).view(*bits.shape[:-1], width)


def words(tensor: Tensor) -> Tensor:
    """Rows of bytes as rows of 32-bit words, for kernels that read several at a time.

    What a device allocated begins at a multiple of 16 bytes; what a file holds may not, and is copied then.
    """
    if tensor.numel() == 0:
        return tensor.new_empty((*tensor.shape[:-1], tensor.shape[-1] // 4), dtype=torch.int32)
    if tensor.data_ptr() % 16 or tensor.storage_offset() % 4:
        tensor = tensor.clone()
    return tensor.view(torch.int32)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of each row of uint8 ``[..., w]`` as booleans ``[..., count]``."""
    words = (packed.to(torch.int64) * _SPREAD) & _SELECT
    return words.view(torch.uint8)[..., :count] != 0


def unpack_floats(packed: Tensor, count: int, zero: float, one: float) -> Tensor:
    """The same bits as float32 values, ``zero`` and ``one``: a table of all 256 bytes, looked up."""
    bits = (torch.arange(256, device=packed.device).unsqueeze(1) >> torch.arange(8, device=packed.device)) & 1
    table = zero + (one - zero) * bits.float()
    rows = table.index_select(0, packed.flatten().int())
    return rows.view(*packed.shape[:-1], packed.shape[-1] * 8)[..., :count]


def unpack_signs(packed: Tensor, count: int) -> Tensor:
    """Sign bits as float32: +1 for 0, -1 for 1. In training they are float32 already, and only cut to ``count``."""
    return packed[..., :count] if packed.is_floating_point() else unpack_floats(packed, count, 1.0, -1.0)


def as_floats(bits: Tensor) -> Tensor:
    """Booleans as float32 zeros and ones; from bytes, which is several times faster on a CPU."""
    return bits.view(torch.uint8).float()


def as_signs(negative: Tensor) -> Tensor:
    """Booleans as float32 signs: -1 where ``negative``."""
    return as_floats(negative).mul_(-2).add_(1)


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Integers ``[k]``, 0 <= value < 2^bits, as bit planes: uint8 ``[bits, packed_width(k)]``, plane b holds bit b."""
    planes = torch.empty(bits, packed_width(len(values)), dtype=torch.uint8, device=values.device)
    for bit in range(bits):
        planes[bit] = pack_bits((values >> bit & 1).bool())
    return planes


def unpack_integers(planes: Tensor, start: int, stop: int) -> Tensor:
    """Integers ``start .. stop`` of those packed, as float32 (exact up to 24 bits)."""
    first = start // 8
    window = planes[:, first : (stop + 7) // 8]
    values = torch.zeros(window.shape[1] * 8, device=planes.device)
    for bit, plane in enumerate(window):
        values += unpack_floats(plane, len(values), 0.0, float(2**bit))
    return values[start - 8 * first : stop - 8 * first]
