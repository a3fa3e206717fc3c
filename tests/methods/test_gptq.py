from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from choosing import choose_column
from matrices import damped, hessian_of, random_factor, random_inputs, random_weight
from signbit.calibration.hessian import Factor, factorize, quadratic
from signbit.layouts import Integers
from signbit.layouts.fields import unpack_fields
from signbit.methods import gptq, rtn
from signbit.methods.gptq import GPTQOptions
from signbit.methods.options import Feedback
from signbit.methods.rounding import round_in_turn
from signbit.methods.rtn import IntegerCode, RTNOptions
from signbit.recipe import Recipe

FEEDBACKS = get_args(Feedback)


def quantize(weight: Tensor, seed: int = 0, **options: Any) -> Integers:
    return gptq.quantize(weight, random_factor(weight.shape[1], seed), GPTQOptions(**options))


def textbook(weight: Tensor, factor: Factor, options: GPTQOptions) -> Tensor:
    """Algorithm 1 in float64: a column at a time, its error passed on to all columns after it at once."""
    n, m = weight.shape
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(factor)), upper=True)
    work, values = weight.double(), torch.zeros(n, m, dtype=torch.float64)
    largest, size = 2**options.bits - 1, options.group_size or m
    for j in range(m):
        if j % size == 0:
            group = work[:, j : j + size]
            lo, hi = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            if not options.mean:
                hi = group.abs().amax(1)
                lo = -hi
            scale = (hi - lo) / largest
            rounded = scale.half()
            up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
            scale = torch.where(rounded.double() < scale, up, rounded).double()
            zero = (-lo / scale).round() if options.mean else torch.full_like(lo, 2 ** (options.bits - 1))
        values[:, j] = scale * (((work[:, j] / scale).round() + zero).clamp(0, largest) - zero)
        error = (work[:, j] - values[:, j]) / upper[j, j]
        work[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return values


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"mean": False}, {"group_size": 0}, {"group_size": 7}], ids=str)
def test_equals_the_textbook_loop(options: dict[str, Any], bits: int, seed: int) -> None:
    weight, factor = random_weight(6, 50, seed), random_factor(50, seed)
    chosen = GPTQOptions(**{"group_size": 20, "bits": bits, **options})
    found = gptq.quantize(weight, factor, chosen).dequantize().double()
    wanted = textbook(weight, factor, chosen)
    # Where a weight lies between two levels, rounding in float32 may decide, and all after it in the row depends on
    # that: nearly all rows are the same to the last level.
    same = ((found - wanted).abs() <= 1e-3 * wanted.abs() + 1e-5).all(1)
    assert same.sum() >= 5


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"refits": 2, "passes": 2}, {"clip": True, "scale_dtype": "bfloat16"}], ids=str
)
def test_packing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, feedback: Feedback, mean: bool, options: dict[str, Any]
) -> None:
    if feedback == "none":
        options = {key: value for key, value in options.items() if key != "refits"}
    fit, codes = IntegerCode.fit, []

    def recording(*arguments: Any) -> IntegerCode:
        codes.append(fit(*arguments))
        return codes[-1]

    monkeypatch.setattr(IntegerCode, "fit", recording)
    layout = quantize(random_weight(5, 70), feedback=feedback, group_size=32, mean=mean, bits=3, **options)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))


def test_reassigned_weights_get_the_nearest_level() -> None:
    weight = random_weight(60, 24)
    code = IntegerCode.fit(weight, RTNOptions(bits=2))
    drifted = weight[:, 3] + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    found = choose_column(code, 3, drifted)
    choices = (torch.arange(4).unsqueeze(1) - code.grid.zeros) * code.grid.scales.float()
    assert torch.allclose((found - drifted).abs(), (choices - drifted).abs().amin(0), atol=1e-6)


def test_values_are_linear_in_the_coefficients() -> None:
    code = IntegerCode.fit(random_weight(6, 24), RTNOptions(bits=3))
    assert torch.equal((code.features() * code.grid.scales.float().view(1, -1, 1)).sum(0), code.values())
    code.set_coefficients(torch.full((1, 6), -0.1))
    assert torch.equal(code.grid.scales, torch.full((6,), 0.1).half())


def test_without_feedback_it_is_round_to_nearest() -> None:
    weight = random_weight(5, 70)
    plain = rtn.quantize(weight, None, RTNOptions(bits=3, group_size=32))
    assert torch.equal(quantize(weight, bits=3, group_size=32, feedback="none").dequantize(), plain.dequantize())


def output_error(**options: Any) -> float:
    hessian = hessian_of(random_inputs(400, 96))
    factor = factorize(hessian, 0.01)
    total = 0.0
    for seed in range(4):
        weight = random_weight(8, 96, seed)
        layout = gptq.quantize(weight, factor, GPTQOptions(**{"bits": 3, "group_size": 32, **options}))
        total += quadratic(layout.dequantize() - weight, hessian)
    return total


def test_each_step_lowers_the_output_error() -> None:
    assert output_error() < output_error(feedback="block") < output_error(feedback="none")
    assert output_error(refits=2) < output_error()
    assert output_error(passes=2) < output_error()
    assert output_error(bits=4) < 0.5 * output_error()
    assert output_error(bits=2, clip=True) < output_error(bits=2)
    assert output_error(group_size=16) < output_error(group_size=0)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1)])
def test_degenerate_matrices(shape: tuple[int, int], feedback: Feedback, mean: bool) -> None:
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    refits = 0 if feedback == "none" else 1
    for size in (2, 0):
        layout = quantize(rows, feedback=feedback, mean=mean, group_size=size, bits=4, refits=refits, passes=1)
        values = layout.dequantize()
        assert torch.equal(values[1:2], torch.zeros_like(rows[1:2]))
        assert torch.allclose(values, rows, rtol=0.25)


def test_always_zero_inputs() -> None:
    inputs = random_inputs(100, 40)
    inputs[:, :16] = 0  # the whole first group
    layout = gptq.quantize(random_weight(5, 40), factorize(hessian_of(inputs), 0.01), GPTQOptions(group_size=16))
    assert torch.equal(layout.dequantize()[:, :16], torch.zeros(5, 16))


@pytest.mark.parametrize(("bits", "row"), [(2, 144 + 4), (3, 144 + 72 + 4 + 4), (4, 288 + 4)])
def test_presets_are_as_published_and_take_their_bytes(bits: int, row: int) -> None:
    recipe = Recipe.load(f"gptq-{bits}")
    weight = random_weight(7, 576)
    layout = recipe.method.quantize(weight, random_factor(576), recipe.options)
    assert isinstance(layout, Integers)
    assert (layout.spec.bits, layout.spec.group_size, layout.spec.zeros) == (bits, 128, True)
    assert sum(layout.items().values()) == 7 * (row + 5 * 2)
    assert unpack_fields(layout.codes, 576, bits).unique().tolist() == list(range(2**bits))


def test_deterministic() -> None:
    weight = random_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_needs_a_hessian() -> None:
    with pytest.raises(ValueError, match="Hessian"):
        gptq.quantize(random_weight(2, 8), None, GPTQOptions())


@pytest.mark.parametrize("mean", [False, True])
def test_rows_of_zeros_stay_so_whatever_is_chosen(mean: bool) -> None:
    weight = random_weight(6, 24)
    weight[2] = 0
    code = IntegerCode.fit(weight, RTNOptions(bits=3, mean=mean))
    round_in_turn(code, random_weight(24, 6, seed=1))
    assert not code.levels[2].any() and not code.values()[2].any()
