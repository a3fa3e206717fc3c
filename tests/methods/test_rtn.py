from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matrices import random_weight
from signbit.errors import SignbitError
from signbit.layouts import Integers
from signbit.layouts.fields import unpack_fields
from signbit.methods import rtn
from signbit.methods.rtn import RTNOptions, integer_rows


def quantize(weight: Tensor, **options: Any) -> Integers:
    return rtn.quantize(weight, None, RTNOptions(**options))


def codes_of(layout: Integers) -> Tensor:
    return unpack_fields(layout.codes, layout.shape[1], layout.spec.bits)


def random_rows(n: int, m: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator) * 10 ** (2 * torch.rand(n, 1, generator=generator) - 1)


# --- the grid as rtn.py tells it, in float64 --------------------------------------------------------------------------


def half_up(x: float) -> float:
    """The least float16 that is no smaller than a positive x."""
    rounded = torch.tensor(x).half()
    if float(rounded) < x:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf).half())
    return float(rounded)


def slow_row(row: Tensor, options: RTNOptions) -> Tensor:
    """One row of one group."""
    largest = 2**options.bits - 1
    lo, hi = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    if not options.mean:
        hi = float(row.abs().max())
        lo = -hi
    found, least = torch.zeros_like(row), float("inf")
    for part in [1 - i / 100 for i in range(80)] if options.clip else [1.0]:
        scale = half_up(part * (hi - lo) / largest)
        if scale == 0:
            return found
        zero = round(-part * lo / scale) if options.mean else 2 ** (options.bits - 1)
        values = ((row / scale).round() + zero).clamp(0, largest).sub(zero) * scale
        error = float((values - row).abs().pow(options.clip_norm).sum())
        if error < least:
            found, least = values, error
    return found


def slow_group(weight: Tensor, options: RTNOptions) -> Tensor:
    return torch.stack([slow_row(row, options) for row in weight])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": False},
        {"bits": 2},
        {"bits": 3, "group_size": 0},
        {"bits": 8},
        {"bits": 2, "clip": True},
        {"bits": 3, "clip": True, "mean": False},
        {"bits": 3, "clip": True, "clip_norm": 1.0},
    ],
    ids=str,
)
def test_equals_the_slow_implementation(options: dict[str, Any]) -> None:
    weight = random_weight(6, 50)
    weight[0].abs_()
    weight[1].abs_().neg_()
    chosen = RTNOptions(**{"group_size": 20, **options})
    wanted = [slow_group(part.double(), chosen) for part in weight.split(chosen.group_size or 50, dim=1)]
    found = rtn.quantize(weight, None, chosen).dequantize()
    assert torch.allclose(found.double(), torch.cat(wanted, dim=1), rtol=1e-5, atol=1e-6)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["float16", "bfloat16"]),
    st.sampled_from([0, 1, 7, 64]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_every_weight_is_within_half_a_step(
    n: int, m: int, bits: int, mean: bool, dtype: str, size: int, seed: int
) -> None:
    weight = random_rows(n, m, seed)
    layout = quantize(weight, bits=bits, mean=mean, scale_dtype=dtype, group_size=size)
    step = layout.scales.float().repeat_interleave(min(size or m, m), dim=1)[:, :m]
    values = layout.dequantize()
    assert ((values - weight).abs() <= 0.5001 * step).all()
    assert (values * weight >= 0).all()  # signs are kept
    for group in codes_of(layout).split(size or m, dim=1) if dtype == "float16" else ():
        # The grid is no wider than the weights need. (A symmetric one goes one below what its scale is made for.)
        assert ((group.amax(1) == 2**bits - 1) | (group.amin(1) == (0 if mean else 1))).all()


@pytest.mark.parametrize("options", [{}, {"clip": True}], ids=str)
def test_two_bits_use_all_four_levels(options: dict[str, Any]) -> None:
    layout = quantize(random_weight(20, 128), bits=2, **options)
    assert codes_of(layout).unique().tolist() == [0, 1, 2, 3]
    assert unpack_fields(layout.get_buffer("zeros"), 1, 2).unique().tolist() == [1, 2]


def test_two_symmetric_bits_are_three_levels() -> None:
    """The fourth is below the smallest weight, unless feedback moves one there: zero points are worth their bits."""
    assert codes_of(quantize(random_weight(20, 128), bits=2, mean=False)).unique().tolist() == [1, 2, 3]


def test_zero_points_are_worth_it_only_where_weights_are_lopsided() -> None:
    lopsided = random_weight(20, 128).abs()
    errors = {mean: (quantize(lopsided, mean=mean).dequantize() - lopsided).norm() for mean in (False, True)}
    assert errors[True] < 0.6 * errors[False]


def test_a_clipped_range_has_less_error_of_the_power_that_was_asked_for() -> None:
    weight = random_weight(20, 128)

    def error(norm: float, **options: Any) -> float:
        difference = quantize(weight, bits=2, **options).dequantize() - weight
        return float(difference.abs().pow(norm).sum())

    assert error(2.4, clip=True) < 0.7 * error(2.4)
    assert error(2.4, clip=True) < error(2.4, clip=True, clip_norm=1)
    assert error(1, clip=True, clip_norm=1) < error(1, clip=True)


@pytest.mark.parametrize("options", [{}, {"mean": False}, {"clip": True}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1)])
def test_constant_rows(shape: tuple[int, int], bits: int, options: dict[str, Any]) -> None:
    """They are at the end of their range: exact but for the scale's rounding, or half a step off if symmetric."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for size in (2, 0):
        layout = quantize(rows, bits=bits, group_size=size, **options)
        values = layout.dequantize()
        assert torch.equal(values[1:2], torch.zeros_like(rows[1:2]))
        step = layout.scales.float().max(1, keepdim=True).values
        slack = 0.5001 * step if "mean" in options else 2**-10 * rows.abs()
        assert ((values - rows).abs() <= slack).all()


def test_a_matrix_of_zeros() -> None:
    for options in ({}, {"clip": True}, {"mean": False}):
        assert torch.equal(quantize(torch.zeros(3, 40), group_size=16, **options).dequantize(), torch.zeros(3, 40))


@pytest.mark.parametrize("mean", [False, True])
def test_half_a_step_holds_where_the_scale_is_subnormal(mean: bool) -> None:
    """float16 has few values below 6e-5: a scale that is rounded down there would clip the row's largest weights."""
    weight = torch.linspace(-1, 1, 50).unsqueeze(0) * torch.logspace(-5, -3, 40).unsqueeze(1)
    layout = quantize(weight, bits=8, mean=mean, group_size=0)
    error = (layout.dequantize() - weight).abs().amax(1)
    assert (error <= 0.5001 * layout.scales.float().squeeze(1)).all()


def test_rows_too_small_for_the_scale_are_zero() -> None:
    assert torch.equal(quantize(torch.full((1, 6), 1e-9)).dequantize(), torch.zeros(1, 6))


@pytest.mark.parametrize("options", [{}, {"mean": False}, {"clip": True}], ids=str)
def test_weights_beyond_the_scales_dtype_are_refused_with_the_way_out(options: dict[str, Any]) -> None:
    weight = torch.full((2, 4), 1e8)
    with pytest.raises(SignbitError, match=r"scales .*scale_dtype=bfloat16"):
        quantize(weight, **options)
    values = quantize(weight, scale_dtype="bfloat16", **options).dequantize()
    assert torch.allclose(values, weight, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_rows_take_any_float_dtype(dtype: torch.dtype, bits: int) -> None:
    weight = random_rows(4, 10).to(dtype)
    layout, wide = (integer_rows(w, bits, "float16") for w in (weight, weight.float()))
    assert torch.equal(layout.dequantize(), wide.dequantize())
    assert (layout.spec.bits, layout.spec.group_size, layout.spec.zeros) == (bits, 0, False)


def test_defaults_and_options_reach_the_layout() -> None:
    spec = quantize(random_weight(3, 300)).spec
    assert (spec.bits, spec.group_size, spec.zeros, spec.scale_dtype) == (4, 128, True, "float16")
    spec = quantize(random_weight(3, 100), bits=2, mean=False, scale_dtype="bfloat16").spec
    assert (spec.bits, spec.group_size, spec.zeros, spec.scale_dtype) == (2, 0, False, "bfloat16")
