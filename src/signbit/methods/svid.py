"""Sign-value-independent decomposition (OneBit, arXiv 2402.11295, section 3.3): W ~ sgn(W) o (a c^T).

o is element by element. Since |sgn(W) o X - W| = |X - |W|| element by element, the best a c^T is the best approximation
of |W| of rank one, so that (the paper's proposition 1)

    || W - sgn(W) o a c^T ||  <=  || W - the best matrix of rank one ||

|W| has no negative entry: its leading singular vectors have none either (Perron and Frobenius), and power iteration
from vectors of ones, which are never orthogonal to them, finds them. The paper names SVD and NMF, its code takes
scikit-learn's NMF from a random start; the three have the same product. What differs is how its size is split between a
and c, which SVID leaves open. Here both get the same root mean square:

- neither is near an end of what float16 holds unless the square root of a typical weight is;
- both are then numbers of the same size (0.14 for weights of 0.02), so one learning rate moves input and output vector
  at the same pace in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The leading singular value of the magnitudes of weights is many times the next: a dozen rounds settle float32. A
# matrix that falls apart into blocks may have two that are equal, and then any mixture of their vectors is as good.
_ROUNDS = 200
_SETTLED = 1e-7


def svid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """a [n] and c [m], none negative, for ``weight`` [n, m], all float32. Rows and columns of zeros have zeros."""
    magnitudes = weight.abs()
    largest = magnitudes.amax()
    if largest == 0:
        return torch.zeros_like(weight[:, 0]), torch.zeros_like(weight[0])
    # Squares of very small weights would vanish.
    magnitudes /= largest
    c = torch.ones_like(weight[0]) / weight.shape[1] ** 0.5
    for _ in range(_ROUNDS):
        before, c = c, (magnitudes @ c) @ magnitudes
        c /= c.norm()
        if (c - before).norm() <= _SETTLED:
            break
    # The least-squares a for this c, which has norm 1.
    a = magnitudes @ c
    ratio = (a.square().mean() / c.square().mean()).sqrt()
    scale = largest.sqrt()
    return a / ratio.sqrt() * scale, c * ratio.sqrt() * scale
