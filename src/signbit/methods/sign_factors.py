"""Sign factors: W ~ diag(h) U diag(l) V diag(g) with signs U [n, r] and V [r, m], at any number of bits.

One method for three papers, which differ in scales, paths, importance and in how the factors are found:

| | scales | paths | found by | errors of inputs weighted by |
|---|---|---|---|---|
| DBF (arXiv 2505.11076) | h, l, g | 1 | ADMM (admm.py), inner steps | power |
| NanoQuant (2602.06694) | h, g | 1 | ADMM, no inner steps | power, shrunk to its mean |
| LittleBit (2506.13771) | h, l, g | 1 or 2 | Dual-SVID (dual_svid.py) | 1 |
| here | h, l, g | 1 | ADMM in the Hessian's metric | the whole Hessian |

DBF and NanoQuant weight outputs too, by the power of the loss's gradients there, which methods are not given: it is
taken as 1. All three go on to train what is found here; so can this (``signbit train``, ``tune``).

**Inputs.** With ``metric: diagonal`` column j of W counts as sqrt(H_jj), which the decomposition is taken of and then
divided by. The whole Hessian (``metric: hessian``) is put to a diagonal of ones the same way, so that penalties mean
the same in both. ``metric: none`` looks at no data. ``shrinkage`` draws the powers to their mean, v <- (1 - s) v + s
mean(v), for text that is not the calibration's; under the whole Hessian that is what ``damping`` does.

**Rank.** The largest that ``bits`` pay for, of all that is stored: signs, rows padded to words, scales. A row of U is
r bits, padded to 32, so what is left of a budget is less than 33 ranks. The papers' ranks leave the scales out (DBF) or
the padding (LittleBit), or round down to 32 (NanoQuant).

**Paths.** Each further path is found for what those before it left over, as in LittleBit.

**Scales** (``refits``): least squares for given signs, in turns, in the metric of the whole Hessian (unless ``metric:
none``). With Q = U diag(l) V diag(g),
and so on,

    h_i = (W H Q^T)_ii / (Q H Q^T)_ii
    l   solves  [(U_h^T U_h) o (V_g H V_g^T)] l = diag(U_h^T W H V_g^T)        U_h = diag(h) U, V_g = V diag(g)
    g   solves  [(Q^T Q) o H] g = diag(Q^T W H)                                 Q = diag(h) U diag(l) V

The papers do not refit. Sizes are then shared out so that l has mean 1, and h and g the same root mean square: that
is far from the ends of float16, and l may be left out without a change of size. No scale is negative.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.errors import SignbitError
from signbit.layouts import SignFactors
from signbit.layouts.base import count_items
from signbit.layouts.sign_factors import SignFactorsSpec
from signbit.methods.admm import Metric, Order, Penalty, Schedule, Start, solve
from signbit.methods.column_scales import fit_columns
from signbit.methods.dual_svid import Path, rounded, sgn, truncated
from signbit.methods.options import Method, MethodOptions
from signbit.precision import fast_float32
from signbit.timing import phase

_RIDGE = 1e-6


class SignFactorsOptions(MethodOptions):
    group_size: Literal[0] = Field(0, description="a row has one scale")
    mean: Literal[False] = Field(False, description="there are no means")
    bits: float = Field(1.0, gt=0, le=16, description="most bits a weight, of all that is stored; sets the rank")
    rank: int | None = Field(None, ge=1, le=2**20, description="the rank of each path, whatever bits it takes")
    paths: int = Field(1, ge=1, le=4, description="products of factors that are added up, of the same rank")
    rank_scales: bool = Field(True, description="a scale for each rank, beside those of outputs and inputs")
    solver: Literal["admm", "svid"] = Field("admm", description="how factors are found: iterated, or closed form")
    metric: Literal["hessian", "diagonal", "none"] = Field(
        "hessian", description="what errors of inputs count: the whole Hessian, the inputs' power, or all the same"
    )
    shrinkage: float = Field(0.0, ge=0, le=1, description="metric diagonal: how far powers are drawn to their mean")
    refits: int = Field(2, ge=0, le=100, description="rounds of least squares on the scales at the end")
    iterations: int = Field(100, ge=1, le=10_000, description="of ADMM")
    inner: int = Field(0, ge=0, le=100, description="further steps for the same factor in each half of an iteration")
    order: Order = Field("gauss-seidel", description="whether a half-step uses what the one before it found")
    penalty: Penalty = Field("linear", description="how the penalty grows")
    init: Start = Field("svd", description="where ADMM starts: singular vectors, or normal numbers")
    init_seed: int = Field(0, ge=0, lt=2**63, description="of the normal numbers")

    @model_validator(mode="after")
    def _shrinkage_is_of_powers(self) -> Self:
        if self.shrinkage and self.metric != "diagonal":
            raise ValueError("shrinkage is of metric diagonal; for metric hessian set damping")
        return self

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.iterations, self.inner, self.order, self.penalty, self.init, self.init_seed)


@fast_float32()
def quantize(weight: Tensor, factor: Factor | None, options: SignFactorsOptions) -> SignFactors:
    if factor is None and options.metric != "none":
        raise SignbitError(f"metric {options.metric} needs calibration: set samples to at least 1, or metric to none")
    rank = options.rank or largest_rank(weight.shape, options)
    if factor is not None:
        weight = weight * ~factor.dead
    with phase("fit"):
        powers, metric = _importance(weight, factor, options)
        hessian = _hessian(weight, factor, options) if options.refits else None
    found: list[Path] = []
    rest = weight
    for _ in range(options.paths):
        with phase("admm" if options.solver == "admm" else "fit"):
            found.append(_find(rest, rank, powers, metric, options))
        with phase("refits"):
            if hessian is not None:
                for _ in range(options.refits):
                    found[-1] = _refit(rest, found[-1], hessian, options.rank_scales)
        rest = rest - found[-1].values()
    with phase("packing"):
        return _pack(found, options)


def largest_rank(shape: torch.Size | tuple[int, int], options: SignFactorsOptions) -> int:
    """The largest rank whose tensors take no more than ``options.bits`` a weight."""
    n, m = shape
    budget = options.bits * n * m

    def stored(rank: int) -> int:
        spec = SignFactorsSpec((n, m), rank, options.paths, True, options.rank_scales, True, options.scale_dtype)
        return 8 * sum(count_items(spec).values())

    if stored(1) > budget:
        least = stored(1) / (n * m)
        raise SignbitError(
            f"{options.bits:g} bits a weight do not pay for a rank of 1, which takes {least:.3g} in a matrix of "
            f"{n} x {m}: raise bits, set a rank, or skip it"
        )
    low, high = 1, 2
    while stored(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stored(middle) <= budget else (low, middle)
    return low


def _importance(weight: Tensor, factor: Factor | None, options: SignFactorsOptions) -> tuple[Tensor, Metric]:
    """What columns are multiplied by [m], and the metric of what comes out."""
    if factor is None or options.metric == "none":
        return torch.ones_like(weight[0]), Metric()
    powers = factor.root.square().sum(1)
    if options.metric == "hessian":
        sizes = powers.sqrt()
        return sizes, Metric(factor.root / sizes.unsqueeze(1), factor.upper() * sizes)
    return torch.lerp(powers, powers.mean(), options.shrinkage).sqrt(), Metric()


def _hessian(weight: Tensor, factor: Factor | None, options: SignFactorsOptions) -> Tensor:
    """The metric of the refits [m, m]."""
    if factor is None or options.metric == "none":
        return torch.eye(weight.shape[1], device=weight.device)
    return factor.root @ factor.root.T


def _find(weight: Tensor, rank: int, powers: Tensor, metric: Metric, options: SignFactorsOptions) -> Path:
    target = weight * powers
    # Of a size that float32 can square.
    size = float(target.square().mean().sqrt()) or 1.0
    target = target / size
    if options.solver == "admm" and target.any():
        path = solve(target, rank, metric, options.schedule)
    else:
        path = rounded(*truncated(target, rank, metric.root, metric.inverse))
    path.h, path.g = path.h * size, path.g / powers
    return _shared_out(path, options.rank_scales)


def _shared_out(path: Path, rank_scales: bool) -> Path:
    """The same matrix with no negative scales, l of mean 1 (or all 1, without), h and g of one size."""
    U = path.U * sgn(path.h).unsqueeze(1)
    V = path.V * sgn(path.inner).unsqueeze(1) * sgn(path.g)
    h, inner, g = path.h.abs(), path.inner.abs(), path.g.abs()
    middle = inner.mean()
    if middle > 0:
        h, inner = h * middle, inner / middle
    if h.any() and g.any():
        ratio = (h.square().mean().sqrt() / g.square().mean().sqrt()).sqrt()
        h, g = h / ratio, g * ratio
    return Path(U, V, h, inner if rank_scales else torch.ones_like(inner), g)


def _refit(weight: Tensor, path: Path, hessian: Tensor, rank_scales: bool) -> Path:
    """One round of least squares; the path as it was if that is no better."""
    product = weight @ hessian
    U, V, h, inner, g = path.U, path.V, path.h, path.inner, path.g

    Q = (U * inner) @ (V * g)
    h = (product * Q).sum(1) / ((Q @ hessian) * Q).sum(1).clamp(min=torch.finfo(Q.dtype).tiny)
    if rank_scales:
        outer, within = U * h.unsqueeze(1), V * g
        normal = (outer.T @ outer) * (within @ hessian @ within.T)
        normal.diagonal().add_(_RIDGE * normal.diagonal().mean() + torch.finfo(normal.dtype).tiny)
        inner = torch.linalg.solve(normal, ((outer.T @ product) * within).sum(1))
    g = fit_columns(weight, (U * h.unsqueeze(1) * inner) @ V, hessian)
    found = _shared_out(Path(U, V, h, inner, g), rank_scales)
    return min(path, found, key=lambda one: _error(weight, one, hessian))


def _error(weight: Tensor, path: Path, hessian: Tensor) -> float:
    difference = weight - path.values()
    return float(((difference @ hessian) * difference).sum())


def _pack(paths: list[Path], options: SignFactorsOptions) -> SignFactors:
    def stored(name: str) -> Tensor:
        return torch.stack([getattr(path, name) for path in paths]).to(options.storage)

    return SignFactors.encode(
        out_negative=torch.stack([path.U < 0 for path in paths]),
        in_negative=torch.stack([path.V < 0 for path in paths]),
        out_scales=stored("h"),
        rank_scales=stored("inner") if options.rank_scales else None,
        in_scales=stored("g"),
        scale_dtype=options.scale_dtype,
    )


METHOD = Method(
    name="sign-factors",
    summary="two sign matrices with scales, any number of bits: DBF, NanoQuant, LittleBit",
    paper="DBF, arXiv 2505.11076; NanoQuant, arXiv 2602.06694; LittleBit, arXiv 2506.13771",
    layout=SignFactors,
    options=SignFactorsOptions,
    calibrated=False,
    quantize=quantize,
)
