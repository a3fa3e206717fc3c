"""The linears of one block: what goes into them, what the method makes of each, and what that costs.

Linears that share an input have one Hessian and one factor, and go together. Such groups are shared out over the
processes: whose a group is gets its Hessian's sum over all sequences, decides on its linears, and gives the packed
result to all. On one CPU, several groups are worked on side by side.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from signbit.architectures import Linear, dense_shape, dense_weight, replace_module
from signbit.blockwise.job import Job
from signbit.blockwise.loading import stored_layout
from signbit.calibration.capture import HessianCapture
from signbit.calibration.hessian import Factor, centered, factorize, quadratic
from signbit.errors import SignbitError
from signbit.finite import all_finite
from signbit.layouts import Layout, describe
from signbit.methods.options import MethodOptions
from signbit.modules import QuantizedLinear
from signbit.parallel import side_by_side
from signbit.processes import deal
from signbit.report.quantization import LayerReport
from signbit.source import set_parameter
from signbit.timing import phase


@dataclass(frozen=True)
class _Calibration:
    """What calibration says about one linear input: its mean, and the Hessian of what varies around it if the mean's
    error is put right by a bias, else the Hessian of all."""

    mean: Tensor | None
    hessian: Tensor
    factor: Factor
    notes: list[str]


@dataclass(frozen=True)
class _Original:
    """What the errors of one linear are measured against: its weight, Hessian and mean input."""

    weight: Tensor
    hessian: Tensor | None
    mean: Tensor | None

    def errors(self, packed: Layout) -> tuple[float, float | None]:
        correction = packed.get_buffer("bias").float() if packed.spec.bias else None
        return layer_errors(self.weight, packed.dequantize(), self.hessian, self.mean, correction)


class BlockLinears:
    """The linears of block ``index``, which is loaded.

    capture: to be set watching while the block runs, if there is anything to run it on. weights: the original matrices
    [out, in], float32, by their names in the block, for as long as tuning needs them; else nothing is kept.
    """

    def __init__(self, job: Job, index: int, options: dict[str, MethodOptions], *, tuning: bool) -> None:
        self._job, self._options, self._tuning = job, options, tuning
        self._block, self._prefix = job.block(index)
        self._linears = job.linears(index)
        self.capture = HessianCapture(dict(self._linears))
        self.weights: dict[str, Tensor] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self._groups: list[list[str]] = []
        # Of the linears that this process decides on.
        self._originals: dict[str, _Original] = {}
        self._reports: dict[str, LayerReport] = {}

    def quantize(self) -> None:
        """Put packed linears where dense ones stand; ``layers`` then describes them."""
        processes = self._job.processes
        self.capture.agree(processes)
        self._groups = self.capture.by_input()
        owners = deal([self._size(names) for names in self._groups], processes.count)
        for names, owner in zip(self._groups, owners, strict=True):
            accumulator = self.capture.hessians.get(names[0])
            if accumulator is not None:
                accumulator.collect(processes, owner)
            if owner != processes.rank:
                self.capture.hessians.pop(names[0], None)
                for name in names:
                    self._forget_weight(name)
        mine = [names for names, owner in zip(self._groups, owners, strict=True) if owner == processes.rank]
        largest_first = sorted(mine, key=lambda names: -self._size(names))
        found = side_by_side([partial(self._quantize_group, names) for names in largest_first], self._job.device)
        packed = self._exchange({name: one for group in found for name, one in group.items()})
        for names in self._groups:
            for name in names:
                replace_module(self._block, name, QuantizedLinear(packed[name], self._linears[name].bias))
                self.layers[f"{self._prefix}.{name}"] = describe(packed[name])

    def report_again(self) -> None:
        """Measure again, after tuning."""
        for name, original in self._originals.items():
            linear = self._block.get_submodule(name)
            assert isinstance(linear, QuantizedLinear)
            with phase("errors"):
                weight_error, output_error = original.errors(linear.packed)
            self._reports[name] = dataclasses.replace(
                self._reports[name], weight_error=weight_error, output_error=output_error
            )

    def reports(self) -> list[LayerReport]:
        """What became of each linear, in the order of ``layers``."""
        every: dict[str, LayerReport] = {}
        for told in self._job.processes.tell(self._reports):
            every |= told
        return [every[name] for names in self._groups for name in names]

    def _size(self, names: list[str]) -> int:
        return sum(self._linears[name].weight.numel() for name in names)

    def _forget_weight(self, name: str) -> None:
        """Free a weight now, but for tuning."""
        linear = self._linears[name]
        if self._tuning:
            original = self._originals.get(name)
            self.weights[name] = _matrix(linear) if original is None else original.weight
        set_parameter(linear, "weight", torch.empty_like(linear.weight, device="meta"))

    def _exchange(self, mine: dict[str, Layout]) -> dict[str, Layout]:
        """The packed linears of all processes."""
        if self._job.processes.count == 1:
            return mine
        sent = {
            name: (describe(packed), {key: tensor.cpu() for key, tensor in packed.state_dict().items()})
            for name, packed in mine.items()
        }
        every = dict(mine)
        for told in self._job.processes.tell(sent):
            for name, (description, tensors) in told.items():
                if name not in mine:
                    every[name] = stored_layout(name, description, tensors).to(self._job.device)
        return every

    def _quantize_group(self, names: list[str]) -> dict[str, Layout]:
        """What becomes of linears that share an input, one after the other: their factor is needed once, and not for
        long; their weights are gone afterwards."""
        calibration = self._calibration(names[0]) if self._job.recipe.common.samples else None
        found = {}
        for name in names:
            found[name] = self._quantize_linear(name, calibration)
            self._forget_weight(name)
        return found

    def _quantize_linear(self, name: str, calibration: _Calibration | None) -> Layout:
        full = f"{self._prefix}.{name}"
        weight, options = _matrix(self._linears[name]), self._options[full]
        factor = None if calibration is None else calibration.factor
        try:
            packed = self._job.recipe.method.quantize(weight, factor, options)
        except SignbitError as error:
            raise SignbitError(f"{full}: {error}") from error
        with phase("errors"):
            hessian = None if calibration is None else calibration.hessian
            mean = None if calibration is None else calibration.mean
            quantized = packed.dequantize()
            wanted = weight if factor is None else weight * ~factor.dead
            if bool(((quantized.abs().amax(1) == 0) & (wanted.abs().amax(1) > 0)).any()):
                raise SignbitError(f"{full}: scales are too small for {packed.kind} to hold: use scale_dtype=bfloat16")
            if mean is not None:
                packed = packed.with_bias((weight - quantized) @ mean)
            weight_error, output_error = layer_errors(weight, quantized, hessian, mean)
            if self._tuning:
                self._originals[name] = _Original(weight, hessian, mean)
        self._reports[name] = LayerReport(
            name=full,
            shape=list(packed.shape),
            layout=packed.kind,
            bits_per_weight=8 * sum(packed.items().values()) / weight.numel(),
            nominal_bits_per_weight=packed.nominal_bits,
            weight_error=weight_error,
            output_error=output_error,
            damping=None if factor is None else factor.damping,
            notes=options.notes(weight.shape[1]) + ([] if calibration is None else calibration.notes),
        )
        return packed

    def _calibration(self, name: str) -> _Calibration:
        full, common = f"{self._prefix}.{name}", self._job.recipe.common
        notes = []
        accumulator = self.capture.hessians.pop(name, None)
        if accumulator is None:
            notes.append("no calibration token reached it: quantized with the identity as Hessian")
            width, device = dense_shape(self._linears[name])[1], self._job.device
            hessian, mean = torch.eye(width, device=device), torch.zeros(width, device=device)
        else:
            hessian, mean = accumulator.hessian(), accumulator.mean()
        if not all_finite(hessian):
            raise SignbitError(f"the input of {full} contains NaN or infinite values on the calibration text")
        if common.bias_correction:
            hessian = centered(hessian, mean)
        with phase("factorization"):
            try:
                factor = factorize(hessian, common.damping)
            except SignbitError as error:
                raise SignbitError(f"{full}: {error}") from error
        if factor.damping > common.damping:
            notes.append(f"damping raised to {factor.damping:g}")
        if factor.dead.any():
            notes.append(f"{int(factor.dead.sum())} inputs are always zero")
        return _Calibration(mean if common.bias_correction else None, hessian, factor, notes)


def _matrix(linear: Linear) -> Tensor:
    return dense_weight(linear, linear.weight).float().contiguous()


def layer_errors(
    weight: Tensor,
    quantized: Tensor,
    hessian: Tensor | None,
    mean: Tensor | None = None,
    correction: Tensor | None = None,
) -> tuple[float, float | None]:
    """|W - Q| / |W|, and tr(D H D^T) / tr(W H W^T) with D = W - Q; 0 for a layer of zeros.

    mean: what H was taken around, if the error of the mean has been put right; by exactly D mean, or by ``correction``.
    """
    difference = weight - quantized
    norm = float(weight.norm())
    weight_error = float(difference.norm()) / norm if norm else 0.0
    if hessian is None:
        return weight_error, None
    power, error = quadratic(weight, hessian), quadratic(difference, hessian)
    if mean is not None:
        power += 2 * float((weight @ mean).square().sum())
        if correction is not None:
            error += 2 * float((difference @ mean - correction).square().sum())
    return weight_error, error / power if power else 0.0
