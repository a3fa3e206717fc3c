"""Sign factors in training: DBF's, LittleBit's and NanoQuant's linears, without W in either pass.

    y = sum over paths of  h o (U (l o (V (g o x))))        U = sgn(A) [n, r], V = sgn(B) [r, m]; o element by element

A token costs r (n + m) multiplications a path, not n m. With dy = dL/dy, ste' the derivative that a sign is given
(straight_through.py), t = V (g o x) and z = l o t:

    E = sum over tokens of dy z^T  [n, r]       dh_i = sum over k of U_ik E_ik        dA = h_i E_ik ste'(a_ik)
    dz = U^T (h o dy)                           dl   = sum over tokens of dz o t
    dv = V^T (l o dz)   dx = g o dv             dg   = sum over tokens of x o dv
    F = sum over tokens of (l o dz) x^T  [r, m]                                       dB = F_kj g_j ste'(b_kj)

Nothing is kept between the passes but x, t, and the operands, which are there anyway.

**Start.** What a latent weight of a factor was is not known after packing: ADMM keeps signs only. With all else as it
is, the least-squares value of a sign u_ik in W_i = h_i sum over k of u_ik c_k, c_k = l_k (V_k o g), is

    u_ik + D_i c_k^T / (h_i |c_k|^2) = u_ik m_ik        m_ik = 1 + u_ik D_i c_k^T / (h_i |c_k|^2)        D = W - Q

and m is also the margin of magnitudes.py in units of the coefficient h_i |c_k|: turning the sign adds
4 h_i^2 |c_k|^2 m_ik to the squared error. The same holds for V, with a_k = h o U_k l_k and g_j. So ``latent: weights``
and ``margins`` are one here, |m|; DBF's code starts at +-1 (``constant``), NanoQuant's and LittleBit's at what they
have before rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from signbit.errors import SignbitError
from signbit.layouts import SignFactors
from signbit.layouts.bits import pack_bits, unpack_signs
from signbit.layouts.sign_factors import reconstruct
from signbit.training.linear import Coefficients, LatentLinear
from signbit.training.magnitudes import relative_sizes
from signbit.training.options import TrainingOptions
from signbit.training.straight_through import Estimator, sgn, sgn_gradient

# A [n, r], B [r, m], h [n], l [r], g [m] of one path; scales that it does not have are None.
PathOperands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Product(torch.autograd.Function):
    """One path's ``x W^T`` for x [..., m], in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        estimator: Estimator,
        A: Tensor,
        B: Tensor,
        h: Tensor | None,
        inner: Tensor | None,
        g: Tensor | None,
    ) -> Tensor:
        t = F.linear(_times(x, g), sgn(B).to(x.dtype))
        ctx.estimator = estimator
        ctx.save_for_backward(x, t, A, B, h, inner, g)
        return _times(F.linear(_times(t, inner), sgn(A).to(x.dtype)), h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, t, A, B, h, inner, g = ctx.saved_tensors
        of_x, _, of_A, of_B, of_h, of_inner, of_g = ctx.needs_input_grad
        tokens = gradient.flatten(0, -2)
        x, t = x.flatten(0, -2), t.flatten(0, -2)
        dx = dA = dB = dh = dg = None
        if of_A or of_h:
            E = (tokens.T @ _times(t, inner)).float()
            dh = (sgn(A) * E).sum(1) if of_h else None
            dA = sgn_gradient(A, _times(E, None if h is None else h.unsqueeze(1)), ctx.estimator) if of_A else None
        dz = _times(tokens, h) @ sgn(A).to(x.dtype)
        d_inner = (dz.float() * t.float()).sum(0) if of_inner else None
        dt = _times(dz, inner)
        if of_x or of_g:
            dv = dt @ sgn(B).to(x.dtype)
            dg = (dv.float() * x.float()).sum(0) if of_g else None
            dx = _times(dv, g).view(*gradient.shape[:-1], x.shape[1]) if of_x else None
        if of_B:
            dB = sgn_gradient(B, _times((dt.T @ x).float(), g), ctx.estimator)
        return dx, None, dA, dB, dh, d_inner, dg


def _times(x: Tensor, scale: Tensor | None) -> Tensor:
    """In x's dtype; the product itself in the scale's."""
    return x if scale is None else (x * scale).to(x.dtype)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(latent)
        ctx.estimator = estimator
        return sgn(latent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sgn_gradient(ctx.saved_tensors[0], gradient, ctx.estimator), None


class LatentSignFactors(LatentLinear):
    start: SignFactors

    def __init__(self, start: SignFactors, weight: Tensor, bias: Tensor | None, options: TrainingOptions) -> None:
        super().__init__(start, bias, options)
        if options.scales == "optimal":
            raise SignbitError("scales optimal are not known for sign_factors: use learned or fixed")
        spec, trained = start.spec, options.scales != "fixed"
        self.estimator: Estimator = options.straight_through
        A, B = _starting(start, weight, options)
        # Paths below each other: sharding over processes cuts the first dimension.
        self.out_latent, self.in_latent = nn.Parameter(A.flatten(0, 1)), nn.Parameter(B.flatten(0, 1))

        def coefficients(name: str) -> Coefficients | None:
            return Coefficients(start.get_buffer(name), trained) if getattr(spec, name) else None

        self.out_scale, self.rank_scale = coefficients("out_scales"), coefficients("rank_scales")
        self.in_scale = coefficients("in_scales")

    def paths(self) -> list[PathOperands]:
        """Latent weights, and coefficients as they will be stored, path by path."""
        (n, m), spec = self.start.shape, self.start.spec
        A, B = self.out_latent.view(spec.paths, n, spec.rank), self.in_latent.view(spec.paths, spec.rank, m)
        scales = [one() if one is not None else None for one in (self.out_scale, self.rank_scale, self.in_scale)]
        h, inner, g = ([None] * spec.paths if scale is None else list(scale) for scale in scales)
        return list(zip(A, B, h, inner, g, strict=True))

    def product(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for operands in self.paths():
            y: Tensor = _Product.apply(x, self.estimator, *operands)
            total = y if total is None else total + y
        assert total is not None
        return total

    def weight(self) -> Tensor:
        total: Tensor | None = None
        for A, B, h, inner, g in self.paths():
            one = reconstruct(_Sign.apply(A, self.estimator), _Sign.apply(B, self.estimator), h, inner, g)
            total = one if total is None else total + one
        assert total is not None
        return total

    def packed_tensors(self) -> dict[str, Tensor]:
        (n, m), spec = self.start.shape, self.start.spec
        scales = {"out_scales": self.out_scale, "rank_scales": self.rank_scale, "in_scales": self.in_scale}
        return {
            "out_signs": pack_bits((self.out_latent < 0).view(spec.paths, n, spec.rank)),
            "in_signs": pack_bits((self.in_latent < 0).view(spec.paths, spec.rank, m)),
            **{name: one.packed() for name, one in scales.items() if one is not None},
        }


def _starting(start: SignFactors, weight: Tensor, options: TrainingOptions) -> tuple[Tensor, Tensor]:
    """A [P, n, r] and B [P, r, m]."""
    spec = start.spec
    U, V = unpack_signs(start.out_signs, spec.rank), unpack_signs(start.in_signs, spec.shape[1])
    if options.latent == "constant":
        return U * options.latent_scale, V * options.latent_scale
    difference = weight - start.dequantize()

    def scale(name: str, path: int, length: int) -> Tensor:
        return start.get_buffer(name)[path].float() if getattr(spec, name) else torch.ones(length, device=weight.device)

    for path in range(spec.paths):
        h, g = scale("out_scales", path, spec.shape[0]), scale("in_scales", path, spec.shape[1])
        inner = scale("rank_scales", path, spec.rank)
        within = inner.unsqueeze(1) * V[path] * g
        outer = h.unsqueeze(1) * U[path] * inner
        of_U = _margins(U[path], difference @ within.T, torch.outer(h, within.square().sum(1)))
        of_V = _margins(V[path], outer.T @ difference, torch.outer(outer.square().sum(0), g))
        for signs, sizes in ((U[path], of_U), (V[path], of_V)):
            signs *= relative_sizes(sizes, torch.ones_like(sizes), options)
    return U, V


def _margins(signs: Tensor, slope: Tensor, weight: Tensor) -> Tensor:
    """|m| of each sign; 1 where its coefficients are zero, so that turning it changes nothing."""
    return torch.where(weight == 0, 1.0, 1 + signs * slope / weight).abs()
