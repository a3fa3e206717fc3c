"""Trits: rows of numbers 0, 1 and 2, five to a byte.

Trit j is digit j % 5, lowest first, of byte j // 5 read in base 3, so bytes are at most 242: 1.6 bits each, where 1.585
is the least there is. Rows are padded with zeros to whole 32-bit words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PER_BYTE = 5
LARGEST_BYTE = 3**_PER_BYTE - 1
_WORD_BYTES = 4


def trit_width(count: int) -> int:
    """Bytes that a row of ``count`` trits takes."""
    return -(-count // (_PER_BYTE * _WORD_BYTES)) * _WORD_BYTES


def pack_trits(trits: Tensor) -> Tensor:
    """Pack uint8 ``[n, k]`` of 0, 1 and 2 into uint8 ``[n, trit_width(k)]``."""
    n, count = trits.shape
    width = trit_width(count)
    digits = torch.nn.functional.pad(trits, (0, width * _PER_BYTE - count)).view(n, width, _PER_BYTE)
    packed = digits[..., -1].clone()
    for place in reversed(range(_PER_BYTE - 1)):
        packed = packed * 3 + digits[..., place]
    return packed


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` trits of each row as float32 ``[n, count]``: a table of all bytes, looked up."""
    powers = 3 ** torch.arange(_PER_BYTE, device=packed.device)
    table = (torch.arange(256, device=packed.device).unsqueeze(1) // powers % 3).float()
    return table.index_select(0, packed.flatten().int()).view(len(packed), packed.shape[1] * _PER_BYTE)[:, :count]
