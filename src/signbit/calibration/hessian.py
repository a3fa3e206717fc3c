"""The Hessian of a linear layer's squared output error, and its triangular factor.

For one linear y = W x and its calibration inputs x_1 .. x_N, changing W by D costs

    sum_t |D x_t|^2 / N = 1/2 tr(D H D^T)          H = 2/N sum_t x_t x_t^T

Every post-training method here works with the upper triangular U of

    H^-1 = U^T U          so that          H = R R^T  with  R = U^-1 upper triangular.

U_jj^2 is the j-th diagonal entry of the inverse Hessian of columns j.. (the OBS denominator once the columns before j
are settled; GPTQ, arXiv 2210.17323, section 3.3). R comes from one Cholesky factorization of H with rows and columns
in reverse order. Nothing as large as H is inverted for it: a sweep needs only the blocks of U on its diagonal, which
are the inverses of those of R (methods/sweep.py), and that makes factorizing four times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.finite import all_finite
from signbit.processes import Processes

# Width of the column panels in which the lower triangle of H is accumulated: narrow enough to skip most of the upper
# triangle, wide enough for the matrix products to run at full speed.
PANEL = 256
MAX_DAMPING = 10.0
# Variance as a part of power, below which float32 sums cannot tell it from none.
_STILL = 1e-5


class HessianAccumulator:
    """H of one linear's input, in float32, from batches of activations."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._lower = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, activations: Tensor) -> None:
        """Add inputs ``[..., in]`` of any float dtype."""
        x = activations.reshape(-1, self._lower.shape[0]).float()
        for start in range(0, x.shape[1], PANEL):
            stop = min(start + PANEL, x.shape[1])
            self._lower[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        self._sum += x.sum(0)
        self.tokens += x.shape[0]

    def collect(self, processes: Processes, owner: int | None = None) -> None:
        """Add up what all processes have seen, in ``owner`` or in all; the others' sums are worthless then."""
        tokens = torch.tensor(self.tokens, device=self._sum.device)
        for sums in (self._lower, self._sum, tokens):
            processes.add(sums, owner)
        self.tokens = int(tokens)

    def mean(self) -> Tensor:
        """The mean input [in]."""
        return self._sum / max(self.tokens, 1)

    def hessian(self) -> Tensor:
        """H ``[in, in]``, exactly symmetric; zeros if no token was ever seen."""
        hessian = torch.tril(self._lower).mul_(2.0 / max(self.tokens, 1))
        return hessian.add_(torch.tril(hessian, -1).T)


def centered(hessian: Tensor, mean: Tensor) -> Tensor:
    """H of what varies around the ``mean`` input [in]: H - 2 mean mean^T.

    An input that hardly varies keeps a small part of its power and no correlations: what would be left is rounding. It
    is not dead, for on other text it may vary.
    """
    power = hessian.diagonal()
    hessian = hessian.addr(mean, mean, alpha=-2)
    still = hessian.diagonal() <= _STILL * power
    hessian[still] = 0
    hessian[:, still] = 0
    hessian.diagonal()[still] = _STILL * power[still]
    return hessian


@dataclass(frozen=True)
class Factor:
    """Triangular factor of a damped Hessian.

    root: R = U^-1, float32 [in, in], with H = R R^T and H^-1 = U^T U; dead: bool [in], inputs that were always zero;
    damping: the fraction of the mean diagonal that was added.
    """

    root: Tensor
    dead: Tensor
    damping: float

    @property
    def diagonal(self) -> Tensor:
        """U_jj [in]."""
        return self.root.diagonal().reciprocal()

    def upper(self, columns: slice = slice(None)) -> Tensor:
        """The block of U on its diagonal at these columns, which is computed: [k, k], k^3 operations."""
        root = self.root[columns, columns]
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        return torch.linalg.solve_triangular(root, eye, upper=True)


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Factor H + damping * mean(diag H) * I, with ten times more damping each time Cholesky fails.

    Inputs that were zero on all calibration data say nothing about their columns: they get a diagonal of 1, and the
    caller sets their weights to zero.
    """
    dead = hessian.diagonal() == 0
    backward = hessian.flip(0, 1)  # a copy: columns in reverse order
    diagonal = torch.where(dead, 1.0, hessian.diagonal()).flip(0)
    mean = float(hessian.diagonal().mean()) or 1.0
    while damping <= MAX_DAMPING:
        backward.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backward)
        if not failed and all_finite(lower):
            return Factor(root=lower.flip(0, 1), dead=dead, damping=damping)
        damping = damping * 10 if damping > 0 else 1e-4
    raise SignbitError(
        f"the Hessian cannot be factorized even with damping {MAX_DAMPING:g}: use more or different calibration text"
    )


def quadratic(rows: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = ``rows`` [n, m] and a symmetric H [m, m], from its lower triangle only."""
    total = 0.0
    for start in range(0, len(hessian), PANEL):
        stop = min(start + PANEL, len(hessian))
        panel = rows[:, start:stop]
        total += float(((panel @ hessian[start:stop, start:stop]) * panel).sum())
        if start:
            total += 2 * float(((panel @ hessian[start:stop, :start]) * rows[:, :start]).sum())
    return total
