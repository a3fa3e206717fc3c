"""XNOR inside the sweep: binary weights with error feedback.

The binarizer of XNOR-Net (arXiv 1603.05279) per row and group, put into GPTQ's sweep: what the one-bit PTQ papers
compare with, and the least that calibration can add to plain signs. By default the exact column-by-column feedback
with the group's scales frozen; PB-LLM and BiLLM subtract a mean (``mean: true``), which costs 16 bits a group and
is seldom worth it.

``column_scales`` adds what ARB-LLM_RC (arXiv 2410.03129, section 3.4) found: a scale for every column, shared by all
rows, which costs 16/n bits a weight. Here they are fitted to the layer's output (column_scales.py).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import SignPlanes
from signbit.methods.column_scales import sweep_scaled
from signbit.methods.options import Feedback, Method, SweepOptions
from signbit.methods.sign import PlanesCode, pack
from signbit.methods.sweep import sweep
from signbit.timing import phase


class XnorOptions(SweepOptions):
    mean: bool = Field(False, description="subtract and store a mean for every group")
    planes: int = Field(1, ge=1, le=8, description="sign planes; each binarizes the residual of those before")
    feedback: Feedback = Field("column", description="how the sweep passes a group's error on")
    column_scales: bool = Field(False, description="a scale for every column too, fitted again before every pass")


def quantize(weight: Tensor, factor: Factor | None, options: XnorOptions) -> SignPlanes:
    if factor is None:
        raise ValueError("xnor needs a Hessian")
    size, columns = options.groups_of(weight.shape[1]), None

    def decide(block: Tensor, _: slice) -> PlanesCode:
        return PlanesCode.fit(block, options.planes, options.mean, options.storage)

    if options.column_scales:
        codes, columns = sweep_scaled(weight, factor, size, decide, options)
    else:
        codes = sweep(weight, factor, size, decide, options)
    with phase("packing"):
        return pack(codes, size, columns)


METHOD = Method(
    name="xnor",
    summary="sign planes with Hessian-guided error feedback",
    paper="XNOR-Net, arXiv 1603.05279, in the sweep of GPTQ, arXiv 2210.17323",
    layout=SignPlanes,
    options=XnorOptions,
    calibrated=True,
    quantize=quantize,
)
