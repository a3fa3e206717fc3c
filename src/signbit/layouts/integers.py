"""Integers: W_ij = (q_ij - z_ig) a_ig, codes of 2 to 8 bits on an even grid for each row and group of columns.

The zero point z is one of the codes: stored (asymmetric), or the middle code 2^(bits - 1) throughout (symmetric). Both
make zero exact. GPTQ, round-to-nearest, and embeddings and heads, which are looked up by row, are stored this way.

| tensor | shape | dtype | what |
|---|---|---|---|
| codes | [n, packed_bytes(m, bits)] | uint8 | unsigned, see fields.py |
| scales | [n, G] | scale dtype | |
| zeros | [n, packed_bytes(G, bits)] | uint8 | only if ``zeros`` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, scale_dtype, spread
from signbit.layouts.fields import pack_fields, packed_bytes, unpack_fields


@dataclass(frozen=True)
class IntegersSpec(LayoutSpec):
    bits: int
    group_size: int
    zeros: bool
    scale_dtype: str

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integers have 2 to 8 bits, not {self.bits!r}")
        groups = group_count(m, self.group_size)
        tensors = {
            "codes": TensorSpec((n, packed_bytes(m, self.bits)), torch.uint8, "codes"),
            "scales": TensorSpec((n, groups), scale_dtype(self.scale_dtype), "scales"),
        }
        if self.zeros:
            tensors["zeros"] = TensorSpec((n, packed_bytes(groups, self.bits)), torch.uint8, "zeros")
        return tensors


def middle(bits: int) -> int:
    """The zero point where none is stored."""
    return 1 << (bits - 1)


def reconstruct(levels: Tensor, scales: Tensor) -> Tensor:
    """Values of levels q - z, exact in float32, and float32 scales; methods and the layout both use this."""
    return levels * scales


class Integers(Layout):
    kind = "integers"
    Spec = IntegersSpec
    spec: IntegersSpec
    codes: Tensor
    scales: Tensor

    @classmethod
    def encode(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Integers:
        """Pack codes uint8 ``[n, m]`` and zero points uint8 ``[n, G]``; scales ``[n, G]`` are in storage dtype."""
        n, m = codes.shape
        spec = IntegersSpec(
            shape=(n, m),
            bits=bits,
            group_size=group_size,
            zeros=zeros is not None,
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        )
        tensors = {"codes": pack_fields(codes, bits), "scales": scales}
        if zeros is not None:
            tensors["zeros"] = pack_fields(zeros, bits)
        return cls(spec, tensors)

    @property
    def nominal_bits(self) -> float:
        return float(self.spec.bits)

    def dequantize(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """``rows`` may also be an integer tensor of any shape: a lookup, ``[..., m]``."""
        m, bits, size = self.spec.shape[1], self.spec.bits, self.spec.group_size
        levels = unpack_fields(self.codes[rows], m, bits).float()
        if self.spec.zeros:
            zeros = unpack_fields(self.get_buffer("zeros")[rows], self.scales.shape[1], bits)
            levels -= spread(zeros, size, m)
        else:
            levels -= middle(bits)
        return reconstruct(levels, spread(self.scales[rows], size, m))
