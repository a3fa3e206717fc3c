"""Methods: one file a paper. :data:`METHODS` finds them by name."""

from __future__ import annotations

from signbit.methods import arb_llm, billm, gptq, hbllm, onebit, pb_llm, rtn, sign, sign_factors, stbllm, xnor
from signbit.methods.options import Method, MethodOptions

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (sign, xnor, billm, arb_llm, hbllm, pb_llm, rtn, gptq, stbllm, onebit, sign_factors)
}

__all__ = ["METHODS", "Method", "MethodOptions"]
