"""XNOR inside the sweep: binary weights with error feedback.

The binarizer of XNOR-Net (arXiv 1603.05279) per row and group, put into GPTQ's sweep: what the one-bit PTQ papers
compare with, and the least that calibration can add to plain signs. By default the exact column-by-column feedback
with the group's scales frozen; PB-LLM and BiLLM subtract a mean (``mean: true``), which costs 16 bits a group and
is seldom worth it.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import SignPlanes
from signbit.methods.options import Feedback, Method, SweepOptions
from signbit.methods.sign import quantize_planes


class XnorOptions(SweepOptions):
    mean: bool = Field(False, description="subtract and store a mean for every group")
    planes: int = Field(1, ge=1, le=8, description="sign planes; each binarizes the residual of those before")
    feedback: Feedback = Field("column", description="how the sweep passes a group's error on")


def quantize(weight: Tensor, factor: Factor | None, options: XnorOptions) -> SignPlanes:
    return quantize_planes(weight, factor, options, options.planes, options)


METHOD = Method(
    name="xnor",
    summary="sign planes with Hessian-guided error feedback",
    paper="XNOR-Net, arXiv 1603.05279, in the sweep of GPTQ, arXiv 2210.17323",
    layout=SignPlanes,
    options=XnorOptions,
    calibrated=True,
    quantize=quantize,
)
