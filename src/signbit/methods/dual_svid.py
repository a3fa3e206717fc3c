"""Sign factors in closed form: Dual-SVID (LittleBit, arXiv 2506.13771), and what a matrix in sign factors is made of.

With the truncated singular value decomposition Y ~ (P S^1/2) (S^1/2 Q^T) = A B both factors are replaced by signs times
the best matrix of rank one for their magnitudes (svid.py):

    A ~ U o (a c^T)     B ~ V o (b d^T)     so     Y ~ diag(a) U diag(c b) V diag(d)

o is element by element. Close it is not: rounding to signs a factor that a rotation could have made anything is the
price of a formula. LittleBit trains afterwards; here it is also where ADMM starts (admm.py).

Under an H = R R^T that says how errors of inputs add up, the decomposition is that of Y R, and B = S^1/2 Q^T R^-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.methods.svid import svid


@dataclass
class Path:
    """diag(h) U diag(l) V diag(g), float32: signs U [n, r] and V [r, m], scales h [n], l [r] (``inner``) and g [m]."""

    U: Tensor
    V: Tensor
    h: Tensor
    inner: Tensor
    g: Tensor

    def values(self) -> Tensor:
        return (self.U * self.h.unsqueeze(1) * self.inner) @ (self.V * self.g)


def sgn(x: Tensor) -> Tensor:
    """+-1; sgn(0) = +1, also for -0."""
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x + 0.0)


def rounded(A: Tensor, B: Tensor) -> Path:
    """A [n, r] and B [r, m], each as signs times a matrix of rank one."""
    (a, c), (b, d) = svid(A), svid(B)
    return Path(sgn(A), sgn(B), a, c * b, d)


def truncated(target: Tensor, rank: int, root: Tensor | None, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [n, rank] and B [rank, m] of the best A B for ``target`` [n, m]; both share the singular values.

    root: R, and inverse: R^-1, for the error under R R^T; None: the identity. Of a rank beyond what the target has,
    nothing is known: A has zeros there, and B the first rows again.
    """
    left, values, right = torch.linalg.svd(target if root is None else target @ root, full_matrices=False)
    if inverse is not None:
        right = right @ inverse
    share = values.sqrt()
    A, B = left * share, share.unsqueeze(1) * right
    missing = rank - len(values)
    if missing > 0:
        again = torch.arange(missing, device=B.device) % len(values)
        return torch.cat([A, A.new_zeros(len(A), missing)], dim=1), torch.cat([B, B[again]])
    return A[:, :rank], B[:rank]
