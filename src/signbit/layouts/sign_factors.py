"""Sign factors: W = sum over paths of  diag(h) U diag(l) V diag(g),  U and V of signs only.

U is [n, r] and V [r, m], so a path takes r (n + m) bits of signs: a rank r = n m / (n + m) of one bit a weight, and any
other rank of any other number of bits. A product with W is two products with sign planes, and W itself is never needed.

Stored for n rows, m columns, P paths of rank r:

| tensor | shape | dtype | what |
|---|---|---|---|
| out_signs | [P, n, packed_width(r)] | uint8 | U; bit 1 = negative |
| in_signs | [P, r, packed_width(m)] | uint8 | V |
| out_scales | [P, n] | scale dtype | h; only if ``out_scales`` |
| rank_scales | [P, r] | scale dtype | l; only if ``rank_scales`` |
| in_scales | [P, m] | scale dtype | g; only if ``in_scales`` |

DBF (arXiv 2505.11076) has all three scales, LittleBit (2506.13771) as well, with two paths if it keeps a residual, and
NanoQuant (2602.06694) those of the outputs and inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, scale_dtype
from signbit.layouts.bits import pack_bits, packed_width, unpack_signs
from signbit.layouts.sign_planes import SignPlanes, SignPlanesSpec


@dataclass(frozen=True)
class SignFactorsSpec(LayoutSpec):
    rank: int
    paths: int
    out_scales: bool
    rank_scales: bool
    in_scales: bool
    scale_dtype: str

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        dtype, paths = scale_dtype(self.scale_dtype), self.paths
        if not self.rank or not paths:
            raise ValueError(f"{paths!r} paths of rank {self.rank!r} hold nothing")
        tensors = {
            "out_signs": TensorSpec((paths, n, packed_width(self.rank)), torch.uint8, "signs"),
            "in_signs": TensorSpec((paths, self.rank, packed_width(m)), torch.uint8, "signs"),
        }
        for name, length in (("out_scales", n), ("rank_scales", self.rank), ("in_scales", m)):
            if getattr(self, name):
                tensors[name] = TensorSpec((paths, length), dtype, "scales")
        return tensors


class SignFactors(Layout):
    kind = "sign_factors"
    Spec = SignFactorsSpec
    spec: SignFactorsSpec
    out_signs: Tensor
    in_signs: Tensor

    @classmethod
    def encode(
        cls,
        out_negative: Tensor,
        in_negative: Tensor,
        out_scales: Tensor | None,
        rank_scales: Tensor | None,
        in_scales: Tensor | None,
        scale_dtype: str = "float16",
    ) -> SignFactors:
        """Pack bool [P, n, r] and [P, r, m] with scales [P, n], [P, r] and [P, m], already in storage dtype."""
        paths, n, rank = out_negative.shape
        scales = {"out_scales": out_scales, "rank_scales": rank_scales, "in_scales": in_scales}
        kept = {name: tensor for name, tensor in scales.items() if tensor is not None}
        spec = SignFactorsSpec(
            shape=(n, in_negative.shape[2]),
            rank=rank,
            paths=paths,
            out_scales=out_scales is not None,
            rank_scales=rank_scales is not None,
            in_scales=in_scales is not None,
            scale_dtype=scale_dtype,
        )
        return cls(spec, {"out_signs": pack_bits(out_negative), "in_signs": pack_bits(in_negative), **kept})

    @property
    def nominal_bits(self) -> float:
        n, m = self.spec.shape
        return self.spec.paths * self.spec.rank * (n + m) / (n * m)

    def chains(self) -> list[tuple[Layout, ...]]:
        """For each path diag(l) V diag(g), and then diag(h) U, as sign planes of the same memory."""
        (n, m), rank, dtype = self.spec.shape, self.spec.rank, self.spec.scale_dtype
        inner = SignPlanesSpec((rank, m), 1, 0, False, dtype, self.spec.in_scales)
        outer = SignPlanesSpec((n, rank), 1, 0, False, dtype)
        chains: list[tuple[Layout, ...]] = []
        for path in range(self.spec.paths):
            first = {"signs": self.in_signs[path : path + 1], "scales": self._scales("rank_scales", path, rank)}
            if self.spec.in_scales:
                first["column_scales"] = self.get_buffer("in_scales")[path]
            last = {"signs": self.out_signs[path : path + 1], "scales": self._scales("out_scales", path, n)}
            chains.append((SignPlanes(inner, first), SignPlanes(outer, last)))
        return chains

    def _scales(self, name: str, path: int, length: int) -> Tensor:
        if not getattr(self.spec, name):
            return torch.ones(1, length, 1, dtype=scale_dtype(self.spec.scale_dtype), device=self.device)
        return self.get_buffer(name)[path].view(1, length, 1)

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Exact but for the rounding of sums of ``rank`` numbers: it is a product of matrices."""
        m, rank = self.spec.shape[1], self.spec.rank
        total = None
        for path in range(self.spec.paths):
            h, inner, g = (
                self.get_buffer(name)[path].float() if getattr(self.spec, name) else None
                for name in ("out_scales", "rank_scales", "in_scales")
            )
            outer_signs = unpack_signs(self.out_signs[path][rows], rank)
            product = reconstruct(
                outer_signs, unpack_signs(self.in_signs[path], m), None if h is None else h[rows], inner, g
            )
            total = product if total is None else total + product
        assert total is not None
        return total


def reconstruct(U: Tensor, V: Tensor, h: Tensor | None, inner: Tensor | None, g: Tensor | None) -> Tensor:
    """diag(h) U diag(l) V diag(g) of one path, float32; ``inner`` is l. The sums that every form of W is made by."""
    product = (U if inner is None else U * inner) @ V
    if h is not None:
        product = product * h.unsqueeze(1)
    return product if g is None else product * g
