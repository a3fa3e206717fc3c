"""ADMM for sign factors: Y ~ A B with both factors signs times a matrix of rank one.

The solver of DBF (arXiv 2505.11076) and NanoQuant (arXiv 2602.06694), whose variants are options of this one. Both
factors are kept twice: real numbers that fit Y, and Z, the nearest of the form sgn(M) o (a c^T) (SVID, svid.py), with a
dual D that adds up how far the two are apart. With the other factor's Z fixed, its rows or columns put to norm 1, a
half-step for B is

    B <- argmin  |Y - X B|_H^2 + (rho k + ridge) |B|^2 - 2 rho k <B, Z - D>         X = Z_A, k = mean diag(X^T X)
    Z <- SVID(B + D)         D <- D + B - Z

and the same for A. The penalty rho grows from 0 to 1: first the factors are free, last they agree with their signs.

**H.** Both papers weight inputs by the square root of their power, which is a scaling of Y's columns, and outputs by
that of their gradients, a scaling of its rows (here all ones: methods are not given gradients). Then |.|_H is the plain
norm, and each half-step one Cholesky solve of the size of the rank. The outputs of a layer depend on what inputs have
in common, which powers do not say; with H whole the half-step for A is as cheap as before,

    A (X H X^T + (rho k + ridge) I)  =  Y H X^T + rho k (Z - D)                     X = Z_B

and that for B is a Sylvester equation, which eigenvectors of X^T X = P diag(s) P^T and of H = Q diag(e) Q^T solve:

    X^T X B H + (rho k + ridge) B = F     B = P [ (P^T F Q) / (s_i e_j + rho k + ridge) ] Q^T

Those of H are found once. So the factors see the correlations that a sweep over columns sees, and in every step.

Papers and released code differ among themselves; this has both where they do:

- ``inner``: after the step above DBF takes two more for the same factor, with rho = 1. NanoQuant takes none.
- ``order``: the second half-step uses the first's new Z in DBF (Gauss-Seidel), its old one in NanoQuant (Jacobi).
- ``penalty``: rho = t / T (what NanoQuant's program is run with) or its cube (DBF; NanoQuant's function).
- ridge: 0.03 in both, relative to k in DBF, absolute in NanoQuant where k is 1: the same.
- ``init``: both take normal numbers; the alternative is the truncated singular value decomposition (dual_svid.py).
- SVID is five power iterations from random vectors in both. Here each goes on from the vectors of the last time, which
  are almost right: two rounds do.
- DBF inverts two matrices in each solve; here nothing is inverted.

ADMM does not fall steadily. A few iterates of the second half, the last one and the start are compared, and the best is
returned: the result is never worse than the SVID of the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from signbit.methods.dual_svid import Path, rounded, sgn, truncated

Order = Literal["gauss-seidel", "jacobi"]
Penalty = Literal["linear", "cubic"]
Start = Literal["svd", "random"]

_RIDGE = 0.03
_ROUNDS = 2
# Iterates that are compared, in the second half.
_LOOKS = 5


@dataclass(frozen=True)
class Schedule:
    """How long, and which variant."""

    iterations: int = 100
    inner: int = 0
    order: Order = "gauss-seidel"
    penalty: Penalty = "linear"
    start: Start = "svd"
    seed: int = 0

    def rho(self, step: int) -> float:
        return float((step / self.iterations) ** (3 if self.penalty == "cubic" else 1))


class Metric:
    """H = R R^T [m, m], and what is asked of it; without ``root`` the identity."""

    def __init__(self, root: Tensor | None = None, inverse: Tensor | None = None) -> None:
        self.root, self.inverse = root, inverse
        self.hessian = None if root is None else root @ root.T

    def apply(self, rows: Tensor) -> Tensor:
        """rows H."""
        return rows if self.hessian is None else rows @ self.hessian

    def error(self, target: Tensor, A: Tensor, B: Tensor) -> float:
        """tr(D H D^T) for D = target - A B."""
        difference = torch.addmm(target, A, B, alpha=-1)
        return float((self.apply(difference) * difference).sum())

    def eigen(self) -> tuple[Tensor, Tensor] | None:
        if self.hessian is None:
            return None
        values, vectors = torch.linalg.eigh(self.hessian)
        return values.clamp(min=0), vectors


class _Factor:
    """One factor's Z, dual, and the vector that its power iteration goes on from."""

    def __init__(self, start: Tensor) -> None:
        self.right = torch.ones_like(start[0])
        self.dual = torch.zeros_like(start)
        self.z = start
        self.settle(start)

    def settle(self, solved: Tensor) -> None:
        """The projection's turn, and the dual's."""
        moved = solved + self.dual
        magnitudes, right = moved.abs(), self.right
        for _ in range(_ROUNDS):
            right = (magnitudes @ right) @ magnitudes
            right /= right.norm().clamp(min=_tiny(right))
        self.right, left = right, magnitudes @ right
        self.z = sgn(moved) * torch.outer(left, right)
        self.dual = moved - self.z


def solve(target: Tensor, rank: int, metric: Metric, schedule: Schedule) -> Path:
    """Sign factors of ``target`` [n, m], float32."""
    A, B = _start(target, rank, metric, schedule)
    first, second = _Factor(A), _Factor(B)
    product, eigen = metric.apply(target), metric.eigen()
    best = rounded(A, B)
    least = metric.error(target, *_both(best))
    looks = {schedule.iterations - i * max(1, schedule.iterations // (2 * _LOOKS)) for i in range(_LOOKS)}
    for step in range(1, schedule.iterations + 1):
        old = first.z
        X = _unit(second.z, 1)
        _half_step(first, _for_first(X, product, metric), schedule, step)
        X = _unit(first.z if schedule.order == "gauss-seidel" else old, 0)
        _half_step(second, _for_second(X, product, eigen), schedule, step)
        if step in looks:
            # The second factor was fitted to the first with unit columns, whatever these were before.
            found = rounded(X if schedule.order == "gauss-seidel" else _unit(first.z, 0), second.z)
            error = metric.error(target, *_both(found))
            if error < least:
                best, least = found, error
    return best


# Solve for a factor, given the penalty and what it is drawn to.
_Solver = Callable[[float, Tensor], Tensor]


def _half_step(factor: _Factor, solver: _Solver, schedule: Schedule, step: int) -> None:
    for rho in _penalties(schedule, step):
        factor.settle(solver(rho, factor.z - factor.dual))


def _penalties(schedule: Schedule, step: int) -> Iterator[float]:
    yield schedule.rho(step)
    for _ in range(schedule.inner):
        yield 1.0


def _for_first(X: Tensor, product: Tensor, metric: Metric) -> _Solver:
    """X: Z_B with unit rows; product: Y H."""
    normal, right = metric.apply(X) @ X.T, X @ product.T
    unit = float(normal.diagonal().mean())

    def solver(rho: float, towards: Tensor) -> Tensor:
        return _solve(normal, right + rho * unit * towards.T, (rho + _RIDGE) * unit).T

    return solver


def _for_second(X: Tensor, product: Tensor, eigen: tuple[Tensor, Tensor] | None) -> _Solver:
    """X: Z_A with unit columns; product: Y H."""
    normal, right = X.T @ X, X.T @ product
    unit = float(normal.diagonal().mean())
    if eigen is None:
        return lambda rho, towards: _solve(normal, right + rho * unit * towards, (rho + _RIDGE) * unit)
    of_inputs, Q = eigen
    of_ranks, P = torch.linalg.eigh(normal)
    weights = torch.outer(of_ranks.clamp(min=0), of_inputs)

    def solver(rho: float, towards: Tensor) -> Tensor:
        turned = P.T @ ((right + rho * unit * towards) @ Q)
        return (P @ (turned / (weights + (rho + _RIDGE) * unit))) @ Q.T

    return solver


def _solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(N + ridge I)^-1 right; N is positive semidefinite, and the ridge never far below its diagonal."""
    regular = normal.clone()
    regular.diagonal().add_(max(ridge, _tiny(normal)))
    return torch.cholesky_solve(right, torch.linalg.cholesky(regular))


def _start(target: Tensor, rank: int, metric: Metric, schedule: Schedule) -> tuple[Tensor, Tensor]:
    if schedule.start == "svd":
        return truncated(target, rank, metric.root, metric.inverse)
    generator = torch.Generator().manual_seed(schedule.seed)
    n, m = target.shape
    A, B = (torch.randn(shape, generator=generator).to(target) for shape in ((n, rank), (rank, m)))
    return A, B


def _both(path: Path) -> tuple[Tensor, Tensor]:
    return path.U * path.h.unsqueeze(1) * path.inner, path.V * path.g


def _unit(z: Tensor, dim: int) -> Tensor:
    return z / z.norm(dim=dim, keepdim=True).clamp(min=_tiny(z))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
