"""What all latent linears share: coefficients in training, the forward pass, and packing.

**Coefficients** (scales, means, the bias correction) are trained in float32 and used as their storage dtype holds them,
with the gradient of no rounding. Each tensor is trained in units of its own size, the power of two next to its root
mean square, so that one learning rate means the same relative step for scales of rows (0.02), of columns (1) and means
(0.001), in every layer and model; a power of two, because nothing is rounded by it and the start stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from signbit.layouts import Layout
from signbit.modules import complete
from signbit.training.options import TrainingOptions
from signbit.training.product import Matrix, Operands, multiply, whole
from signbit.training.straight_through import rounded


class Coefficients(nn.Module):
    """Coefficients of a layout in training; what they are for the forward pass is what ``packed`` stores."""

    value: Tensor

    def __init__(self, stored: Tensor, trained: bool) -> None:
        super().__init__()
        self.dtype = stored.dtype
        size = float(stored.float().square().mean().sqrt())
        self.unit = 2.0 ** round(math.log2(size)) if size else 1.0
        value = stored.float() / self.unit
        if trained:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    @property
    def largest(self) -> float:
        """What ``value`` may be without being infinite in storage."""
        return torch.finfo(self.dtype).max / self.unit

    def forward(self) -> Tensor:
        return rounded(self.value * self.unit, self.dtype)

    def packed(self) -> Tensor:
        with torch.no_grad():
            return self().to(self.dtype)


class LatentLinear(nn.Module):
    """``y = x W^T + b`` with W = ``weight()``, the matrix that :meth:`pack` stores, to the bit.

    Parameters that require gradients are trained, all float32 whatever the model is cast to; everything else is a
    buffer, or the module's own bias. Subclasses hold latent weights and coefficients and say, as a
    :class:`~signbit.training.product.Matrix`, how W follows from them; or define :meth:`product` and :meth:`weight`,
    if a product needs no W.
    """

    matrix: Matrix
    bias: nn.Parameter | None
    correction: Coefficients | None

    def __init__(self, start: Layout, bias: Tensor | None, options: TrainingOptions) -> None:
        super().__init__()
        self.start = start
        self.out_features, self.in_features = start.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        trained = options.scales != "fixed"
        self.correction = Coefficients(start.get_buffer("bias"), trained) if start.spec.bias else None

    def operands(self) -> Operands:
        """What ``matrix`` is made from: latent weights, and coefficients as they will be stored."""
        raise NotImplementedError

    def packed_tensors(self) -> dict[str, Tensor]:
        """The tensors of the layout that training has changed, without the bias correction."""
        raise NotImplementedError

    def latents(self) -> list[nn.Parameter]:
        """Trained latent weights; :meth:`scales` are the other trained parameters."""
        coefficients = {id(parameter) for parameter in self.scales()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in coefficients]

    def scales(self) -> list[nn.Parameter]:
        """Trained coefficients."""
        return [p for one in self.modules() if isinstance(one, Coefficients) for p in one.parameters()]

    def limits(self) -> dict[str, float]:
        """How large the entries of trained parameters may be for what they are packed as to be finite, by name."""
        of_latents = self._largest_latent()
        found = {name: of_latents for name, parameter in self.named_parameters() if parameter.requires_grad}
        for name, one in self.named_modules():
            if isinstance(one, Coefficients) and one.value.requires_grad:
                found[f"{name}.value"] = one.largest
        return found

    def _largest_latent(self) -> float:
        """Of a latent weight nothing is stored but its sign, unless scales are made of them."""
        return torch.finfo(torch.float32).max

    def weight(self) -> Tensor:
        """[out, in] float32, differentiable."""
        return whole(self.matrix, self.operands())

    def product(self, x: Tensor) -> Tensor:
        """``x W^T`` in x's dtype."""
        return multiply(x, self.matrix, self.operands())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        correction = None if self.correction is None else self.correction()
        return complete(self.product(x), self.start.spec.norm, correction, self.bias)

    @torch.no_grad()
    def pack(self) -> Layout:
        tensors = dict(self.start.named_buffers()) | self.packed_tensors()
        if self.correction is not None:
            tensors["bias"] = self.correction.packed()
        return type(self.start)(self.start.spec, tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentLinear:
        # As layouts do: model.bfloat16() changes what a model computes in, not what is trained.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
