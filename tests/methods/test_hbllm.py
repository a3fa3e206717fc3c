from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from choosing import choose_column
from matrices import binarized, damped, half, hessian_of, random_factor, random_inputs, random_weight, skewed_weight
from signbit.calibration.hessian import Factor, factorize, quadratic
from signbit.errors import SignbitError
from signbit.layouts import HaarPlanes
from signbit.layouts.bits import unpack_bits
from signbit.layouts.haar import haar
from signbit.methods import hbllm
from signbit.methods.hbllm import HaarCode, HBLLMOptions, fill_average, fit, salient_columns, transformed
from signbit.methods.options import Feedback
from signbit.methods.sweep import sweep
from signbit.recipe import Recipe

FEEDBACKS = get_args(Feedback)
VARIANTS = ("row", "column")


def quantize(weight: Tensor, seed: int = 0, **options: Any) -> HaarPlanes:
    return hbllm.quantize(weight, random_factor(weight.shape[1], seed), HBLLMOptions(**options))


def bits_per_weight(layout: HaarPlanes) -> float:
    return 8 * sum(layout.items().values()) / (layout.shape[0] * layout.shape[1])


# --- the method, step by step as hbllm.py tells it, in float64 --------------------------------------------------------


def transform(length: int, group_size: int = 0) -> Tensor:
    """T, pair by pair; coefficients of a column vector are T times it."""
    matrix = torch.eye(length, dtype=torch.float64)
    size = group_size or length
    for start in range(0, length, size):
        for j in range(start, min(start + size, length) - 1, 2):
            matrix[j : j + 2, j : j + 2] = torch.tensor([[1, 1], [1, -1]]) * 0.5**0.5
    return matrix


def slow_binarize(x: Tensor, center: Tensor, scale: str) -> Tensor:
    deviation = x - half(center)
    size = deviation.abs().mean() if scale == "l1" else deviation.square().mean().sqrt()
    return half(center) + half(size) * torch.where(deviation < 0, -1.0, 1.0).double()


def slow_split(x: Tensor, threshold: float, own: bool, options: HBLLMOptions, *, rounded: bool) -> Tensor:
    """A row binarized in two parts."""
    values = torch.zeros_like(x)
    for part in (x.abs() <= threshold, x.abs() > threshold):
        if part.any():
            center = x[part].mean() if own else x.mean()
            center = center if options.mean else torch.zeros_like(center)
            if rounded:
                values[part] = slow_binarize(x[part], center, options.scale)
            else:
                d = x[part] - center
                size = d.abs().mean() if options.scale == "l1" else d.square().mean().sqrt()
                values[part] = center + size * torch.where(d < 0, -1.0, 1.0).double()
    return values


def slow_codebook(x: Tensor, own: bool, options: HBLLMOptions) -> Tensor:
    """Step 3: every candidate is tried."""
    fractions = np.linspace(0.1, 0.9, options.split_candidates)
    errors = []
    for fraction in fractions:
        error = torch.zeros(len(x), dtype=torch.float64)
        for i, row in enumerate(x):
            source = row if options.partition == "row" else x
            threshold = float(np.quantile(source.abs().numpy(), fraction, method="nearest"))
            error[i] = (row - slow_split(row, threshold, own, options, rounded=False)).square().sum()
        errors.append(error)
    table = torch.stack(errors)
    if options.partition == "global":
        table = table.sum(1, keepdim=True).expand_as(table)
    # Candidates that are alike but for rounding: the first.
    best = [int((column <= column.min() * (1 + 1e-5) + 1e-12).nonzero()[0]) for column in table.T]
    values = torch.zeros_like(x)
    for i, row in enumerate(x):
        source = row if options.partition == "row" else x
        threshold = float(np.quantile(source.abs().numpy(), fractions[best[i]], method="nearest"))
        values[i] = slow_split(row, threshold, own, options, rounded=True)
    return values


def slow_salient(weight: Tensor, diagonal: Tensor, options: HBLLMOptions) -> list[int]:
    if options.max_salient == 0:
        return []
    scores = weight.square() / diagonal.square()
    norms = scores.norm(1 if options.column_norm == "l1" else 2, dim=0)
    ranking = (-norms).argsort(stable=True)
    errors = []
    for count in range(1, min(options.max_salient, weight.shape[1]) + 1):
        parts = scores[:, ranking[:count]], scores[:, ranking[count:]]
        errors.append(sum(float((binarized(part, 2) - part).square().sum()) for part in parts))
    return sorted(ranking[: 1 + errors.index(min(errors))].tolist())


def slow_group(weight: Tensor, diagonal: Tensor, options: HBLLMOptions) -> Tensor:
    n, k = weight.shape
    rows, columns = transform(n), transform(k)
    salient = slow_salient(weight, diagonal, options)
    ordinary = [j for j in range(k) if j not in salient]
    values = torch.zeros_like(weight)
    if options.variant == "column":
        for part, own in ((ordinary, not options.share_mean), (salient, True)):
            if part:
                values[:, part] = rows.T @ slow_codebook(rows @ weight[:, part], own, options)
        return values
    filled = weight.clone()
    for j in salient:
        near = [i for i in ordinary if abs(i - j) <= options.fill_reach] or ordinary
        filled[:, j] = weight[:, near].mean(1) if near else 0
    coefficients = filled @ columns.T
    for band in (coefficients[:, 0::2], coefficients[:, 1::2]):
        if band.shape[1]:
            band.copy_(slow_codebook(band.clone(), not options.share_mean, options))
    values = coefficients @ columns
    if salient:
        lacking = rows @ (weight - values)[:, salient]
        values[:, salient] += rows.T @ slow_codebook(lacking, True, options)
    return values


def slow(weight: Tensor, factor: Factor, options: HBLLMOptions) -> Tensor:
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(factor)), upper=True)
    work, values = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for columns in torch.arange(weight.shape[1]).split(options.group_size or weight.shape[1]):
        start, stop = int(columns[0]), int(columns[-1]) + 1
        values[:, columns] = slow_group(work[:, columns], upper.diagonal()[columns], options)
        error = (work - values)[:, columns]
        if options.feedback == "diagonal":
            work[:, stop:] -= error / upper.diagonal()[columns] @ upper[start:stop, stop:]
        elif options.feedback == "block":
            work[:, stop:] -= error @ torch.linalg.inv(upper[start:stop, start:stop]) @ upper[start:stop, stop:]
    return values


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": False},
        {"share_mean": False},
        {"scale": "rms"},
        {"partition": "global", "split_candidates": 81},
        {"column_norm": "l1"},
        {"max_salient": 3, "fill_reach": 1},
        {"max_salient": 0, "feedback": "block"},
        {"feedback": "none", "fill_reach": 0},
        {"group_size": 0, "max_salient": 12},
        {"group_size": 13},
    ],
    ids=str,
)
def test_equals_the_slow_implementation(variant: str, options: dict[str, Any]) -> None:
    weight, factor = skewed_weight(5, 44), random_factor(44)
    chosen = HBLLMOptions(**{"variant": variant, "group_size": 20, **options})
    found = hbllm.quantize(weight, factor, chosen).dequantize()
    # A step of float16 where a coefficient lies on the edge between two.
    assert torch.allclose(found.double(), slow(weight, factor, chosen), rtol=4e-3, atol=4e-3)


# --- the parts --------------------------------------------------------------------------------------------------------


def settings_of(feedback: Feedback) -> dict[str, Any]:
    """Settings that go with this feedback in either variant."""
    return {"feedback": feedback} | ({"max_salient": 0, "refits": 1, "passes": 1} if feedback == "column" else {})


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [{"mean": False}, {"share_mean": False}, {"scale_dtype": "bfloat16"}, {"group_size": 0}, {"group_size": 7}],
    ids=str,
)
def test_packing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, feedback: Feedback, variant: str, options: dict[str, Any]
) -> None:
    codes: list[Any] = []

    def recording(*arguments: Any) -> list[Any]:
        codes.extend(original(*arguments))
        return codes

    original = sweep
    monkeypatch.setattr(hbllm, "sweep", recording)
    chosen = {"group_size": 32, "variant": variant, **settings_of(feedback), **options}
    layout = quantize(skewed_weight(5, 70), **chosen)
    values = torch.cat([code.values() for code in codes], dim=1)
    if variant == "column":
        values = haar(values, 0)
    elif feedback == "column":
        values = haar(values, 1, layout.spec.group_size)
    assert torch.equal(layout.dequantize(), values)


def some_code(mean: bool, own: bool, n: int = 60, k: int = 24) -> HaarCode:
    """Two codebooks of alternate columns, the second with the larger scale first in every third row."""
    options = HBLLMOptions(mean=mean, share_mean=not own)
    code = fit(skewed_weight(n, k), torch.arange(k) % 2, (own, own), options)
    code.scales[1, :, ::3] = code.scales[1, :, ::3].flip(0)
    return code


@pytest.mark.parametrize(("mean", "own"), [(False, False), (True, False), (True, True)])
def test_reassigned_coefficients_get_the_nearest_of_four_values(mean: bool, own: bool) -> None:
    code = some_code(mean, own)
    for column in (0, 1, 7):
        drifted = torch.randn(60, generator=torch.Generator().manual_seed(column))
        drifted[0] = -0.0
        found = choose_column(code, column, drifted)
        scales = code.scales[column % 2]
        means = code.means[column % 2] if code.means is not None else torch.zeros_like(scales)
        nearest = (torch.cat([means + scales, means - scales]) - drifted).abs().amin(0)
        assert torch.allclose((found - drifted).abs(), nearest, atol=1e-6)


def test_the_sign_of_zero_is_plus() -> None:
    code = some_code(mean=False, own=False)
    choose_column(code, 0, torch.full((60,), -0.0))
    assert not code.negative[0].any()


@pytest.mark.parametrize(("mean", "own"), [(False, False), (True, False), (True, True)])
def test_values_are_the_sum_of_features(mean: bool, own: bool) -> None:
    code = some_code(mean, own)
    features = code.features()
    coefficients = torch.randn(len(features), 60, generator=torch.Generator().manual_seed(0)).half().float()
    count = 2 + mean * (1 + own)
    for book in range(2):
        coefficients[book * count : book * count + 2].abs_()
    code.set_coefficients(coefficients)
    assert torch.allclose(code.values(), (coefficients.unsqueeze(2) * features).sum(0), atol=1e-5)


@pytest.mark.parametrize("scale", ["l1", "rms"])
def test_scales_are_least_squares_or_root_mean_squares(scale: str) -> None:
    code = fit(random_weight(20, 32), torch.zeros(32, dtype=torch.int64), (False,), HBLLMOptions(scale=scale))
    x, signs = random_weight(20, 32), torch.where(code.negative.T, -1.0, 1.0)
    assert code.means is not None
    for g in range(2):
        part = (code.sparse if g else ~code.sparse).T.float()
        deviation = part * (x - code.means[0, g].unsqueeze(1))
        if scale == "l1":
            expected = (deviation * signs).sum(1) / part.sum(1)
        else:
            expected = (deviation.square().sum(1) / part.sum(1)).sqrt()
        assert torch.allclose(code.scales[0, g], expected, rtol=1e-3)


def test_filling_averages_the_ordinary_neighbours() -> None:
    weight = torch.arange(1.0, 11.0).unsqueeze(0)
    salient = torch.zeros(10, dtype=torch.bool)
    salient[[0, 4, 5]] = True
    filled = fill_average(weight, salient, 3)
    assert filled[0, 0] == pytest.approx((2 + 3 + 4) / 3)
    assert filled[0, 4] == pytest.approx((2 + 3 + 4 + 7 + 8) / 5)
    assert torch.equal(filled[:, ~salient], weight[:, ~salient])
    assert fill_average(weight, salient, 0)[0, 4] == pytest.approx((2 + 3 + 4 + 7 + 8 + 9 + 10) / 7)
    assert torch.equal(fill_average(weight, torch.ones_like(salient), 3), torch.zeros_like(weight))


def test_salient_columns_are_those_that_matter() -> None:
    weight, diagonal = random_weight(20, 32), torch.ones(32)
    weight[:, [5, 9]] *= 10
    found = salient_columns(weight, diagonal, HBLLMOptions(max_salient=2))
    assert set(found.nonzero().flatten().tolist()) <= {5, 9} and found.any()
    diagonal[20] = 1e-3
    assert salient_columns(weight, diagonal, HBLLMOptions(max_salient=1))[20]


def test_a_single_large_weight_makes_a_column_salient_by_l2_only() -> None:
    weight = torch.ones(10, 8)
    weight[3, 2] = 2.5  # s = 6.25, by l1 15.25 against 22.5
    weight[:, 6] = 1.5
    ranked = {
        norm: salient_columns(weight, torch.ones(8), HBLLMOptions(max_salient=1, column_norm=norm))
        for norm in ("l1", "l2")
    }
    assert ranked["l1"].nonzero().flatten().tolist() == [6]
    weight[3, 2] = 3.0  # s = 9, by l2 above the other's 7.1
    assert salient_columns(weight, torch.ones(8), HBLLMOptions(max_salient=1)).nonzero().flatten().tolist() == [2]
    assert ranked["l2"].any()


@pytest.mark.parametrize("group_size", [0, 8, 7])
def test_the_transformed_hessian_measures_the_same_error(group_size: int) -> None:
    factor = random_factor(30)
    difference = random_weight(4, 30).double()
    rotated = haar(difference, 1, group_size)
    found = transformed(factor, group_size)
    assert found.damping == 0
    before, after = (((d @ h) * d).sum() for d, h in ((difference, damped(factor)), (rotated, damped(found))))
    assert float(after) == pytest.approx(float(before), rel=1e-4)


def test_block_feedback_does_not_depend_on_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row variant without salient columns: swept in coefficients it decides as if it were swept in weights."""
    weight, factor = random_weight(6, 48), random_factor(48)
    options = HBLLMOptions(max_salient=0, feedback="block", group_size=16)
    found = hbllm.quantize(weight, factor, options).dequantize()
    assert torch.allclose(found.double(), slow(weight, factor, options), rtol=4e-3, atol=4e-3)


# --- degenerate input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (5, 1), (1, 1), (4, 24)])
def test_constant_rows(shape: tuple[int, int], feedback: Feedback, variant: str, mean: bool) -> None:
    """Among them one of zeros; groups of 8 and 9, so that the last may hold one column."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0, 0.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for size in (8, 9, 0):
        layout = quantize(rows, variant=variant, mean=mean, group_size=size, **settings_of(feedback))
        assert torch.allclose(layout.dequantize(), rows, atol=5e-3)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_matrix_of_zeros(feedback: Feedback, variant: str) -> None:
    zeros = torch.zeros(3, 40)
    assert torch.equal(quantize(zeros, variant=variant, group_size=16, **settings_of(feedback)).dequantize(), zeros)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_always_zero_inputs(feedback: Feedback, variant: str) -> None:
    inputs = random_inputs(100, 40)
    inputs[:, :17] = 0  # the whole first group, and one of a pair of the next
    hessian = hessian_of(inputs)
    weight = skewed_weight(6, 40)
    options = HBLLMOptions(variant=variant, group_size=16, **settings_of(feedback))
    layout = hbllm.quantize(weight, factorize(hessian, 0.01), options)
    assert torch.equal(layout.dequantize()[:, :16], torch.zeros(6, 16))
    assert quadratic(layout.dequantize() - weight, hessian) < 0.3 * quadratic(weight, hessian)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("limit", [0, 1, 5, 49])
def test_no_group_has_more_salient_columns_than_allowed(variant: str, limit: int) -> None:
    layout = quantize(skewed_weight(5, 100), variant=variant, group_size=32, max_salient=limit)
    if limit == 0:
        assert layout.spec.salient_columns == 0
        return
    counts = [int(part.sum()) for part in unpack_bits(layout.get_buffer("salient"), 100).split(32)]
    assert all(1 <= count <= limit for count in counts)
    assert (layout.spec.salient_columns, layout.spec.salient_groups) == (sum(counts), 4)


@pytest.mark.parametrize(("size", "stored"), [(0, 0), (40, 0), (41, 0), (39, 39), (128, 0)])
def test_a_group_of_the_whole_row_is_stored_as_such(size: int, stored: int) -> None:
    assert quantize(skewed_weight(5, 40), group_size=size).spec.group_size == stored


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic(variant: str) -> None:
    weight = skewed_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, variant=variant, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- options and presets ----------------------------------------------------------------------------------------------


def test_needs_a_hessian() -> None:
    with pytest.raises(ValueError, match="Hessian"):
        hbllm.quantize(random_weight(2, 8), None, HBLLMOptions())


@pytest.mark.parametrize("change", [{"feedback": "column"}, {"refits": 1}, {"passes": 1}], ids=str)
def test_the_row_variant_with_salient_columns_refuses_what_it_cannot_do(change: dict[str, Any]) -> None:
    with pytest.raises(SignbitError, match="max_salient: 0 or variant: column"):
        Recipe.load("hbllm-row", change)
    Recipe.load("hbllm-row", change | {"max_salient": 0})
    Recipe.load("hbllm-column", change)


def preset_options(name: str) -> HBLLMOptions:
    options = Recipe.load(name).options
    assert isinstance(options, HBLLMOptions)
    return options


@pytest.mark.parametrize("width", [384, 576])
@pytest.mark.parametrize(("preset", "coefficients"), [("hbllm-row", 10), ("hbllm-column", 7), ("hbllm-plus", 4)])
def test_stored_bits(preset: str, coefficients: int, width: int) -> None:
    """Two bits a weight and so many coefficients a row and group, as the paper's appendix D counts them."""
    options = preset_options(preset)
    layout = hbllm.quantize(skewed_weight(256, width), random_factor(width), options)
    salient = layout.spec.salient_columns
    assert (salient > 0) == (preset != "hbllm-plus")
    planes = 2 * width + (64 * -(-salient // 32) if preset == "hbllm-row" else 0)
    columns = 32 * -(-width // 32) / 256 if salient else 0
    expected = (planes + columns + 16 * coefficients * -(-width // options.group_size)) / width
    assert bits_per_weight(layout) == pytest.approx(expected)


def test_plus_beats_the_papers_presets_at_fewer_bits() -> None:
    hessian = hessian_of(random_inputs(1200, 384))
    factor = factorize(hessian, 0.01)
    weight = random_weight(24, 384)
    found = {}
    for name in ("hbllm-row", "hbllm-column", "hbllm-plus"):
        layout = hbllm.quantize(weight, factor, preset_options(name))
        found[name] = quadratic(layout.dequantize() - weight, hessian), bits_per_weight(layout)
    for name in ("hbllm-row", "hbllm-column"):
        assert found["hbllm-plus"][0] < 0.9 * found[name][0]
        assert found["hbllm-plus"][1] < found[name][1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_lowers_the_output_error(variant: str) -> None:
    hessian = hessian_of(random_inputs(400, 96))
    factor = factorize(hessian, 0.01)

    def error(**options: Any) -> float:
        total = 0.0
        for seed in range(3):
            weight = skewed_weight(8, 96, seed)
            layout = hbllm.quantize(weight, factor, HBLLMOptions(variant=variant, group_size=32, **options))
            total += quadratic(layout.dequantize() - weight, hessian)
        return total

    steps = {"max_salient": 0, "mean": False}
    assert error(**steps, feedback="column") < error(**steps, feedback="block") < error(**steps, feedback="none")
    assert error(**steps, feedback="column", refits=2) < error(**steps, feedback="column")
    assert error(**steps, feedback="column", passes=2) < error(**steps, feedback="column")
    assert error(feedback="none") < error(feedback="none", scale="rms")
    assert error(feedback="none") < error(feedback="none", split_candidates=1)
