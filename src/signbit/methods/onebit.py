"""OneBit (arXiv 2402.11295): one sign a weight, a vector for the inputs and one for the outputs. Where it starts.

A linear layer becomes (section 3.2, equation 3)

    y = LayerNorm( [(x * g) sgn(W)^T] * h )        g [in], h [out]; LayerNorm without parameters of its own

which is the matrix sgn(W) o h g^T and, with ``norm``, a normalisation of what comes out. The start is the sign-value-
independent decomposition of the original weight (section 3.3, svid.py). It looks at no data. What makes OneBit good is
the training that follows (``signbit train``): after the decomposition alone a model does not write a sentence.

Paper and released code differ, and this takes

- LayerNorm: the paper's, ``norm: true``. The code computes the same, eps 1e-5, and adds a bias after it. Each layer's
  outputs then have mean 0 and variance 1 a token, whatever they had in the original model: a start far away from it,
  which the paper's 7.8 billion tokens of training make up for. Without (``norm: false``) the start is as close to the
  original as its matrices are. A linear with one output (the gate of a shared expert) never has it: one number minus
  its mean is 0.
- decomposition: power iteration. The code's NMF, from random numbers, has the same product.
- sgn(0): +1. In the code's training it is 0, in its packed weights +1.
- bits: 1 + 16 (n + m) / (n m), and the padding of rows to 32 bits. The paper's 1.0073 counts the vectors as weights.

The decision is stored in the layout ``sign_planes``, h as scales of rows, g as scales of columns.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import Layout, SignPlanes
from signbit.methods.options import Method, MethodOptions
from signbit.methods.svid import svid
from signbit.timing import phase


class OneBitOptions(MethodOptions):
    group_size: Literal[0] = Field(0, description="a row has one scale")
    mean: Literal[False] = Field(False, description="there are no means")
    norm: bool = Field(True, description="normalise each token's outputs after every layer of several outputs")


def quantize(weight: Tensor, factor: Factor | None, options: OneBitOptions) -> Layout:
    with phase("fit"):
        rows, columns = svid(weight)
    with phase("packing"):
        layout = SignPlanes.encode(
            negative=(weight < 0).unsqueeze(0),
            scales=rows.to(options.storage).view(1, -1, 1),
            means=None,
            group_size=0,
            column_scales=columns.to(options.storage),
        )
        return layout.with_norm() if options.norm and weight.shape[0] > 1 else layout


METHOD = Method(
    name="onebit",
    summary="signs, one scale a row and one a column: the start of OneBit's training",
    paper="OneBit, arXiv 2402.11295",
    layout=SignPlanes,
    options=OneBitOptions,
    calibrated=False,
    quantize=quantize,
)
