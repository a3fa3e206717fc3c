"""Integer rows: W_ij = scale_i * q_ij with q in 8 or 4 bits and one scale a row.

For embeddings and heads, which are looked up by row and are most of a small model's file.

| tensor | shape | dtype | what |
|---|---|---|---|
| codes | [n, m] int8, or [n, ceil(m / 2)] uint8 | | 4 bits: even columns in the low nibble, two's complement |
| scales | [n] | scale dtype | |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, scale_dtype


@dataclass(frozen=True)
class IntegerRowsSpec(LayoutSpec):
    bits: int
    scale_dtype: str

    def tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        if self.bits not in (4, 8):
            raise ValueError(f"integer rows have 4 or 8 bits, not {self.bits}")
        codes = TensorSpec((n, m), torch.int8, "codes")
        if self.bits == 4:
            codes = TensorSpec((n, (m + 1) // 2), torch.uint8, "codes")
        return {"codes": codes, "scales": TensorSpec((n,), scale_dtype(self.scale_dtype), "scales")}


class IntegerRows(Layout):
    kind = "integer_rows"
    Spec = IntegerRowsSpec
    spec: IntegerRowsSpec
    codes: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor, bits: int, scale_dtype_name: str) -> IntegerRows:
        """Round ``[n, m]`` to the nearest codes under the scale max|row| / (2^(bits-1) - 1), rounded to its dtype."""
        spec = IntegerRowsSpec((weight.shape[0], weight.shape[1]), bits, scale_dtype_name)
        weight = weight.float()
        limit = 2 ** (bits - 1) - 1
        largest = weight.abs().amax(dim=1)
        scales = (largest / limit).to(scale_dtype(scale_dtype_name))
        # Where rounding the scale down (near the dtype's smallest numbers) would clip the largest weight by more than
        # half a step, take the next larger number: the next bit pattern.
        clipped = (largest > scales.float() * (limit + 0.5)) & (scales > 0)
        scales = torch.where(clipped, (scales.view(torch.int16) + 1).view(scales.dtype), scales)
        # Rows of zeros, and rows too small for the scale's dtype, get scale 0 and codes 0.
        divisor = torch.where(scales == 0, torch.inf, scales.float()).unsqueeze(1)
        codes = (weight / divisor).round().clamp(-limit, limit).to(torch.int8)
        if bits == 4:
            codes = torch.nn.functional.pad(codes, (0, weight.shape[1] % 2)).view(torch.uint8) & 0xF
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return cls(spec, {"codes": codes, "scales": scales})

    @property
    def nominal_bits(self) -> float:
        return float(self.spec.bits)

    def dequantize(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """``rows`` may also be an integer tensor of any shape: a lookup, ``[..., m]``."""
        codes = self.codes[rows]
        if self.spec.bits == 4:
            # Sign-extend each nibble: shift it to the top of a signed byte and back.
            signed = codes.view(torch.int8)
            codes = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)[..., : self.spec.shape[1]]
        return codes.float() * self.scales[rows].float().unsqueeze(-1)
