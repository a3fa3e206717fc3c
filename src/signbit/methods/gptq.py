"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323).

The baseline above 2 bits. With H^-1 = U^T U, the columns of each group are quantized from left to right,

    q_j = quant(w_j)      E_j = (w_j - q_j) / U_jj      W_:,j+1.. -= E_j U_j,j+1..      (section 3, algorithm 1)

to the nearest integer on a grid of min to max of each row and group of columns (rtn.py), fitted when the sweep reaches
the group and then frozen. The paper has grids of whole rows (``group_size: 0``) and, at 2 and 3 bits, of groups
(section 4, "Additional tricks"); asymmetric ones, as here by default. ``refits`` and ``passes`` are not the paper's.

The released code fits the grids of groups that are narrower than its batches of 128 columns from weights that lack the
feedback from within the batch; here, as in the paper, every grid sees all feedback so far. Its later additions
``act_order`` (another order of columns) and ``static_groups`` (all grids fitted beforehand) are not offered.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import Integers
from signbit.methods.options import Feedback, Method, SweepOptions
from signbit.methods.rtn import RTNOptions, quantize_integers


class GPTQOptions(RTNOptions, SweepOptions):
    feedback: Feedback = Field("column", description="how the sweep passes a group's error on")


def quantize(weight: Tensor, factor: Factor | None, options: GPTQOptions) -> Integers:
    if factor is None:
        raise ValueError("gptq needs a Hessian")
    return quantize_integers(weight, factor, options, options)


METHOD = Method(
    name="gptq",
    summary="integers of 2 to 8 bits with Hessian-guided error feedback",
    paper="GPTQ, arXiv 2210.17323",
    layout=Integers,
    options=GPTQOptions,
    calibrated=True,
    quantize=quantize,
)
