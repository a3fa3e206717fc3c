"""Methods: one file a paper. :data:`METHODS` finds them by name."""

from __future__ import annotations

from signbit.methods import billm, sign, xnor
from signbit.methods.options import Method, MethodOptions

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in (sign, xnor, billm)}

__all__ = ["METHODS", "Method", "MethodOptions"]
