"""Any layout of sign planes and coefficients in training, by the layout's own mathematics.

Split planes, Haar planes, structured and integer layouts all say in ``dequantize`` how a matrix follows from signs and
coefficients. Here that very code is run on latent weights' signs and on coefficients that have gradients, a tile of
rows at a time, and differentiated by autograd:

    W = dequantize(sgn(w), a)           dL/da = (dW/da)^T dL/dW           dL/dw = ste'(w) (dW/ds)^T dL/dW,  s = sgn(w)

Trained are the planes that are counted as signs, scales and means. Everything that says where a weight belongs (zones,
ranks, regions, salient columns) stays as the method decided, and so do residual signs that share a plane with zones and
the codes of integers. Nothing of the matrix's size is kept between the passes (product.py).

Sign planes, partial matrices and sign factors have forms of their own, with their gradients written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from signbit.errors import SignbitError
from signbit.layouts import Layout
from signbit.layouts.bits import pack_bits, unpack_signs
from signbit.training.linear import Coefficients, LatentLinear
from signbit.training.magnitudes import relative_sizes
from signbit.training.options import TrainingOptions
from signbit.training.product import Operands
from signbit.training.straight_through import Estimator, sgn, sgn_gradient


@dataclass(frozen=True)
class PlanesMatrix:
    """Operands: latent weights of each plane in ``planes``, then the ``coefficients`` as they will be stored."""

    start: Layout
    planes: tuple[str, ...]
    coefficients: tuple[str, ...]
    estimator: Estimator

    @property
    def shape(self) -> tuple[int, int]:
        return self.start.shape

    def values(self, rows: slice, *operands: Tensor) -> Tensor:
        return self._tile(rows, self._of_rows(rows, operands))

    def differentiate(self, rows: slice, gradient: Tensor, into: list[Any], *operands: Any) -> None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in self._of_rows(rows, operands)]
            wanted = [i for i, gradients in enumerate(into) if gradients is not None]
            found = torch.autograd.grad(
                self._tile(rows, inputs), [inputs[i] for i in wanted], gradient, materialize_grads=True
            )
        for i, one in zip(wanted, found, strict=True):
            if i < len(self.planes):
                into[i][rows] = sgn_gradient(operands[i][rows], one, self.estimator)
            elif self.coefficients[i - len(self.planes)] in self.start.of_columns:
                into[i] += one
            else:
                into[i][rows] = one

    def _of_rows(self, rows: slice, operands: tuple[Tensor, ...]) -> list[Tensor]:
        """What a tile is made from: signs, and the coefficients of these rows."""
        signs = [sgn(latent[rows]) for latent in operands[: len(self.planes)]]
        others = zip(self.coefficients, operands[len(self.planes) :], strict=True)
        return signs + [x if name in self.start.of_columns else x[rows] for name, x in others]

    def _tile(self, rows: slice, inputs: list[Tensor]) -> Tensor:
        tensors = dict(zip((*self.planes, *self.coefficients), inputs, strict=True))
        return self.start.with_rows(rows, tensors).dequantize()


class LatentPlanes(LatentLinear):
    start: Layout
    matrix: PlanesMatrix

    def __init__(self, start: Layout, weight: Tensor, bias: Tensor | None, options: TrainingOptions) -> None:
        super().__init__(start, bias, options)
        if options.latent == "weights":
            raise SignbitError(f"latent weights is not known for layout {start.kind}: use margins or constant")
        specs = start.spec.matrix_tensors()
        planes = tuple(name for name, spec in specs.items() if spec.item == "signs")
        coefficients = tuple(name for name, spec in specs.items() if spec.item in ("scales", "means"))
        self.matrix = PlanesMatrix(start, planes, coefficients, options.straight_through)
        # Bits behind a row's end are there too: they have no gradient and stay positive, which is packed as 0.
        self.latent = nn.ParameterDict()
        self.coefficient = nn.ModuleDict(
            {name: Coefficients(start.get_buffer(name), options.scales != "fixed") for name in coefficients}
        )
        for name in planes:
            signs = unpack_signs(start.get_buffer(name), 8 * start.get_buffer(name).shape[-1])
            sizes = torch.full_like(signs, options.latent_scale)
            if options.latent == "margins":
                found, counts = self._margins(name, signs, weight)
                sizes = relative_sizes(found, counts, options)
            self.latent[name] = nn.Parameter(signs * sizes)

    def _margins(self, name: str, signs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (magnitudes.py) of one plane, and 1 where there is one: where a sign has a coefficient. By
        derivatives, since a layout may transform what it stores.

        W is J s + rest in the signs s of a plane, and J^T J is diagonal: a plane's signs do not overlap, and the
        transform is orthonormal. Its diagonal is a^2, and s J^T (W - w) is -a s (w - q).
        """

        def rows_of(plane: Tensor) -> Tensor:
            return self.start.with_rows(slice(None), {name: plane}).dequantize()

        with torch.enable_grad():
            plane = signs.clone().requires_grad_()
            found = rows_of(plane)
            error = found.detach() - weight
            of_error = torch.autograd.grad(found, plane, error, retain_graph=True)[0]
            alone = found.detach() - rows_of(torch.zeros_like(signs))
            squares = torch.autograd.grad(found, plane, alone)[0] * signs
        counts = squares > 0
        sizes = torch.where(counts, squares, 1.0).sqrt()
        return (sizes - signs * of_error / sizes).abs(), counts.float()

    def operands(self) -> Operands:
        # By name: a ParameterDict has an order of its own.
        latents = [self.latent[name] for name in self.matrix.planes]
        return (*latents, *(one() for one in self._coefficients().values()))

    def packed_tensors(self) -> dict[str, Tensor]:
        signs = {name: pack_bits(latent < 0) for name, latent in self.latent.items()}
        return signs | {name: one.packed() for name, one in self._coefficients().items()}

    def _coefficients(self) -> dict[str, Coefficients]:
        return {name: cast(Coefficients, self.coefficient[name]) for name in self.matrix.coefficients}
