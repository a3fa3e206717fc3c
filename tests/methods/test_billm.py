from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import binarized, damped, half, hessian_of, random_factor, random_inputs, random_weight, skewed_weight
from signbit.calibration.hessian import Factor, factorize, quadratic
from signbit.layouts import SplitPlanes
from signbit.layouts.bits import unpack_bits
from signbit.methods import billm
from signbit.methods.billm import BiLLMOptions, quantize_group
from signbit.methods.options import Feedback
from signbit.methods.split_code import SplitCode
from signbit.recipe import Recipe

FEEDBACKS = get_args(Feedback)


def quantize(weight: Tensor, seed: int = 0, **options: Any) -> SplitPlanes:
    return billm.quantize(weight, random_factor(weight.shape[1], seed), BiLLMOptions(**options))


# --- the method, step by step as the paper and billm.py tell it, in float64 -------------------------------------------


def fit(x: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Center, scale [n, 1] and signs of the rows of x."""
    center = half(x.mean(1, keepdim=True)) if mean else torch.zeros(len(x), 1, dtype=x.dtype)
    return center, half((x - center).abs().mean(1, keepdim=True)), torch.where(x < center, -1.0, 1.0).double()


def slow_count(searched: Tensor, options: BiLLMOptions) -> int:
    """Binarize the leading columns twice and the rest once (or twice), for every count; the one with least error."""
    errors = []
    for count in range(1, min(options.max_salient, searched.shape[1]) + 1):
        lead, rest = searched[:, :count], searched[:, count:]
        times = 2 if options.column_search == "salience" else 1
        error = (binarized(lead, 2) - lead).square().sum() + (binarized(rest, times) - rest).square().sum()
        errors.append(float(error))
    return 1 + errors.index(min(errors)) if errors else 0


def slow_threshold(key: Tensor, options: BiLLMOptions) -> float:
    """Split at every candidate and binarize the parts apart, row by row; the one with least error."""
    fractions = np.linspace(0.1, 0.9, options.split_candidates)
    if options.split_grid == "quantile":
        candidates = np.quantile(key.numpy(), fractions, method="nearest")
    else:
        candidates = fractions * float(key.max())
    errors = []
    for candidate in candidates:
        error = 0.0
        for row in key.numpy():
            for part in (row[row <= candidate], row[row > candidate]):
                if part.size:
                    deviation = part - (part.mean() if options.split_search == "salience" else 0)
                    error += float(((np.abs(deviation) - np.abs(deviation).mean()) ** 2).sum())
        errors.append(error)
    return float(candidates[int(np.argmin(errors))])


def slow_group(weight: Tensor, diagonal: Tensor, options: BiLLMOptions) -> Tensor:
    scores = weight.square() / diagonal.square() if options.salience == "hessian" else weight.abs()
    ranking = (-scores.sum(0)).argsort(stable=True)
    searched = scores if options.column_search == "salience" else weight.abs()
    count = slow_count(searched[:, ranking], options)
    salient, rest = ranking[:count], ranking[count:].sort().values
    values = torch.zeros_like(weight)
    if count:
        center, scale, signs = fit(weight[:, salient], options.mean)
        center2, scale2, signs2 = fit(weight[:, salient] - (center + scale * signs), options.mean)
        values[:, salient] = half(center + center2) + scale * signs + scale2 * signs2
    if len(rest):
        key = (scores if options.split_search == "salience" else weight.abs())[:, rest]
        sparse = key > slow_threshold(key, options)
        for i in range(len(weight)):
            for part in (rest[~sparse[i]], rest[sparse[i]]):
                if len(part):
                    center, scale, signs = fit(weight[i : i + 1, part], options.mean)
                    values[i, part] = (center + scale * signs)[0]
    return values


def slow(weight: Tensor, factor: Factor, options: BiLLMOptions) -> Tensor:
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": False},
        {"column_search": "weights"},
        {"split_search": "salience"},
        {"split_grid": "max", "split_candidates": 9},
        {"salience": "magnitude"},
        {"max_salient": 0},
        {"max_salient": 3, "column_search": "weights"},
        {"feedback": "none"},
        {"feedback": "block"},
        {"group_size": 0, "max_salient": 20},
    ],
    ids=str,
)
def test_equals_the_slow_implementation(options: dict[str, Any], seed: int) -> None:
    weight, factor = skewed_weight(6, 50, seed), random_factor(50, seed)
    chosen = BiLLMOptions(**{"group_size": 20, **options})
    found = billm.quantize(weight, factor, chosen).dequantize()
    # A step of float16 where a scale lies on the edge between two.
    assert torch.allclose(found.double(), slow(weight, factor, chosen), rtol=2e-3, atol=2e-3)


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("max_salient", "dtype"), [(0, "float16"), (49, "float16"), (5, "bfloat16")])
def test_packing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, feedback: Feedback, mean: bool, max_salient: int, dtype: str
) -> None:
    codes: list[SplitCode] = []

    def recording(*arguments: Any) -> SplitCode:
        codes.append(quantize_group(*arguments))
        return codes[-1]

    monkeypatch.setattr(billm, "quantize_group", recording)
    options: dict[str, Any] = {"feedback": feedback, "mean": mean, "max_salient": max_salient, "scale_dtype": dtype}
    layout = quantize(skewed_weight(5, 70), group_size=32, **options)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("max_salient", [0, 49])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1), (4, 24)])
def test_what_the_layout_holds_exactly_stays_exact(
    shape: tuple[int, int], feedback: Feedback, mean: bool, max_salient: int
) -> None:
    """Constant rows, among them one of zeros; groups of 8, so that the last may hold one column."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for size in (8, 0):
        layout = quantize(rows, feedback=feedback, mean=mean, group_size=size, max_salient=max_salient)
        assert torch.equal(layout.dequantize(), rows)


def test_a_matrix_of_zeros() -> None:
    assert torch.equal(quantize(torch.zeros(3, 40), group_size=16).dequantize(), torch.zeros(3, 40))


def test_always_zero_inputs() -> None:
    inputs = random_inputs(100, 40)
    inputs[:, :16] = 0  # the whole first group
    hessian = hessian_of(inputs)
    weight = skewed_weight(5, 40)
    layout = billm.quantize(weight, factorize(hessian, 0.01), BiLLMOptions(group_size=16))
    assert torch.equal(layout.dequantize()[:, :16], torch.zeros(5, 16))
    difference = layout.dequantize() - weight
    assert quadratic(difference, hessian) < 0.3 * quadratic(weight, hessian)


@pytest.mark.parametrize("limit", [0, 1, 5, 49])
def test_no_group_has_more_salient_columns_than_allowed(limit: int) -> None:
    layout = quantize(skewed_weight(5, 100), group_size=32, max_salient=limit, column_search="weights")
    salient = unpack_bits(layout.salient, 100)
    counts = [int(part.sum()) for part in salient.split(32)]
    assert all((1 if limit else 0) <= count <= limit for count in counts)
    assert layout.spec.salient_columns == sum(counts)
    assert layout.spec.salient_groups == (4 if limit else 0)


def test_salient_columns_are_those_that_matter() -> None:
    weight, factor = random_weight(20, 32), random_factor(32)
    weight[:, [5, 9]] *= 10
    layout = billm.quantize(weight, factor, BiLLMOptions(group_size=0, max_salient=2, column_search="weights"))
    assert unpack_bits(layout.salient, 32).nonzero().flatten().tolist() == [5, 9]


def test_without_means_none_are_stored() -> None:
    names = {mean: set(quantize(skewed_weight(5, 40), mean=mean).state_dict()) for mean in (False, True)}
    assert names[True] - names[False] == {"means", "salient_means"}


@pytest.mark.parametrize(("size", "stored"), [(0, 0), (40, 0), (41, 0), (39, 39), (128, 0)])
def test_a_group_of_the_whole_row_is_stored_as_such(size: int, stored: int) -> None:
    assert quantize(skewed_weight(5, 40), group_size=size).spec.group_size == stored


def test_each_step_lowers_the_output_error() -> None:
    hessian = hessian_of(random_inputs(400, 96))
    factor = factorize(hessian, 0.01)

    def error(**options: Any) -> float:
        total = 0.0
        for seed in range(4):
            weight = skewed_weight(8, 96, seed)
            layout = billm.quantize(weight, factor, BiLLMOptions(group_size=16, **options))
            total += quadratic(layout.dequantize() - weight, hessian)
        return total

    assert error(feedback="column") < error(feedback="block") < error(feedback="none")
    assert error() < error(max_salient=0)
    assert error() < error(split_candidates=1)


@pytest.mark.parametrize("mean", [False, True])
def test_refits_and_passes_lower_the_output_error(mean: bool) -> None:
    hessian = hessian_of(random_inputs(400, 96))
    factor, weight = factorize(hessian, 0.01), skewed_weight(24, 96)

    def error(**options: Any) -> float:
        chosen = BiLLMOptions(group_size=48, feedback="column", mean=mean, **options)
        return quadratic(billm.quantize(weight, factor, chosen).dequantize() - weight, hessian)

    assert error(refits=2, passes=3) < error(refits=2) < error()


def test_plus_has_less_error_in_fewer_bits() -> None:
    hessian = hessian_of(random_inputs(1000, 256))
    factor, weight = factorize(hessian, 0.01), skewed_weight(64, 256)
    found = {}
    for name in ("billm", "billm-plus"):
        layout = billm.quantize(weight, factor, Recipe.load(name).options)  # type: ignore[arg-type]
        bias = 2 * 64 if Recipe.load(name).common.bias_correction else 0
        found[name] = (quadratic(layout.dequantize() - weight, hessian), sum(layout.items().values()) + bias)
    assert found["billm-plus"][0] < 0.8 * found["billm"][0]
    assert found["billm-plus"][1] < found["billm"][1]


def test_deterministic() -> None:
    weight = skewed_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_needs_a_hessian() -> None:
    with pytest.raises(ValueError, match="Hessian"):
        billm.quantize(random_weight(2, 8), None, BiLLMOptions())
