from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from matrices import hessian_of, random_factor, random_inputs, random_weight
from signbit.calibration.hessian import factorize, quadratic
from signbit.methods import column_scales, xnor
from signbit.methods.column_scales import fit_columns, rank_one, sweep_scaled
from signbit.methods.sign import PlanesCode
from signbit.methods.xnor import XnorOptions


def decide(block: Tensor, _: slice) -> PlanesCode:
    return PlanesCode.fit(block, 1, False, torch.float16)


def output_error(weight: Tensor, hessian: Tensor, **options: Any) -> float:
    layout = xnor.quantize(weight, factorize(hessian, 0.01), XnorOptions(**options))
    return quadratic(layout.dequantize() - weight, hessian)


@pytest.mark.parametrize("size", [0, 16])
def test_rank_one_is_the_leading_singular_pair_of_each_group(size: int) -> None:
    weight = random_weight(20, 40)
    found = rank_one(weight, size)
    for part, columns in zip(weight.split(size or 40, dim=1), found.split(size or 40), strict=True):
        leading = torch.linalg.svd(part.abs())[2][0].abs()
        assert torch.allclose(columns / columns.norm(), leading, atol=1e-4)


def test_fitted_columns_are_least_squares_on_the_output() -> None:
    inputs, weight = random_inputs(200, 12).double(), random_weight(7, 12).double()
    values = weight.sign() * weight.abs().mean(1, keepdim=True)
    found = fit_columns(weight, values, inputs.T @ inputs)
    # x -> sum_j c_j x_j q_ij for all outputs i at once: one row of the system for each token and output.
    system = torch.cat([inputs * row for row in values])
    best = torch.linalg.lstsq(system, torch.cat([inputs @ row for row in weight]).unsqueeze(1)).solution.squeeze(1)
    assert torch.allclose(found, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("feedback", ["diagonal", "block", "column"])
def test_fixed_scales_of_one_change_nothing(monkeypatch: pytest.MonkeyPatch, feedback: str) -> None:
    monkeypatch.setattr(column_scales, "rank_one", lambda weight, size: torch.ones_like(weight[0]))
    weight, factor = random_weight(5, 50), random_factor(50)
    options = XnorOptions(group_size=16, feedback=feedback, refits=1)
    codes, columns = sweep_scaled(weight, factor, 16, decide, options)
    assert torch.equal(columns, torch.ones(50))
    plain = xnor.quantize(weight, factor, options).dequantize()
    assert torch.equal(torch.cat([code.values() for code in codes], dim=1), plain)


def test_powers_of_two_in_the_columns_are_taken_out_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """W diag(c) under inputs divided by c is the same problem, and gets the same code."""
    c = 2.0 ** torch.arange(50).remainder(5)
    monkeypatch.setattr(column_scales, "rank_one", lambda weight, size: c)
    weight, factor = random_weight(5, 50), random_factor(50)
    options = XnorOptions(group_size=16, refits=1)
    moved = type(factor)(factor.root / c.unsqueeze(1), factor.dead, factor.damping)
    codes, columns = sweep_scaled(weight * c, moved, 16, decide, options)
    assert torch.equal(columns, c)
    plain = xnor.quantize(weight, factor, options).dequantize()
    assert torch.equal(torch.cat([code.values() for code in codes], dim=1), plain)


@pytest.mark.parametrize("planes", [1, 2])
def test_scales_and_each_pass_lower_the_output_error(planes: int) -> None:
    hessian, weight = hessian_of(random_inputs(400, 96)), random_weight(40, 96)
    options: dict[str, Any] = {"group_size": 32, "planes": planes, "refits": 1}
    errors = [output_error(weight, hessian, passes=passes, column_scales=True, **options) for passes in range(5)]
    assert all(after < before * (1 + 1e-4) for before, after in pairwise(errors))
    for passes in (1, 4):
        assert errors[passes] < 0.95 * output_error(weight, hessian, passes=passes, **options)


@pytest.mark.parametrize("feedback", ["none", "column"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packing_changes_nothing(feedback: str, dtype: str) -> None:
    weight, factor = random_weight(5, 70), random_factor(70)
    options = XnorOptions(
        group_size=32, planes=2, mean=True, feedback=feedback, passes=2, column_scales=True, scale_dtype=dtype
    )
    codes, columns = sweep_scaled(
        weight, factor, 32, lambda block, _: PlanesCode.fit(block, 2, True, options.storage), options
    )
    found = xnor.quantize(weight, factor, options).dequantize()
    assert torch.equal(found, torch.cat([code.values() for code in codes], dim=1) * columns)


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1)])
def test_what_signs_hold_exactly_stays_exact(shape: tuple[int, int], passes: int) -> None:
    """Constant rows, among them one of zeros."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for size in (0, 2):
        options = XnorOptions(group_size=size, column_scales=True, passes=passes)
        found = xnor.quantize(rows, random_factor(shape[1]), options).dequantize()
        assert torch.allclose(found, rows, rtol=2e-3, atol=0)


@pytest.mark.parametrize("zero", ["weights", "some columns", "some inputs"])
def test_zeros(zero: str) -> None:
    inputs, weight = random_inputs(200, 40), random_weight(5, 40)
    if zero == "weights":
        weight.zero_()
    elif zero == "some columns":
        weight[:, 3:9] = 0
    else:
        inputs[:, 3:9] = 0
    hessian = hessian_of(inputs)
    options = XnorOptions(group_size=16, planes=2, column_scales=True, refits=1, passes=3)
    found = xnor.quantize(weight, factorize(hessian, 0.01), options).dequantize()
    assert quadratic(found - weight, hessian) <= 0.5 * quadratic(weight, hessian)
