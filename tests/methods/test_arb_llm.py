from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from matrices import damped, half, hessian_of, random_factor, random_inputs, random_weight, skewed_weight
from signbit.calibration.hessian import Factor, factorize, quadratic
from signbit.layouts import SplitPlanes
from signbit.methods import arb_llm, billm
from signbit.methods.arb_llm import ArbLLMOptions, calibrate, fit_zone, quantize_group
from signbit.methods.billm import BiLLMOptions, partition
from signbit.methods.options import Feedback
from signbit.methods.split_code import SplitCode
from signbit.recipe import Recipe

FEEDBACKS = get_args(Feedback)
FORMS: list[dict[str, Any]] = [
    {"variant": variant, "mean": mean, "bitmap": bitmap}
    for variant, mean in (("plain", True), ("plain", False), ("x", True), ("x", False), ("rc", False))
    for bitmap in (True, False)
]


def quantize(weight: Tensor, seed: int = 0, **options: Any) -> SplitPlanes:
    return arb_llm.quantize(weight, random_factor(weight.shape[1], seed), ArbLLMOptions(**options))


# --- the method as arb_llm.py tells it, in float64, weight by weight --------------------------------------------------


class SlowZone:
    """One zone of a group: rows of (column, weight), with the coefficients of each row and, for rc, column."""

    def __init__(self, weight: Tensor, member: Tensor, order: int, options: ArbLLMOptions) -> None:
        (self.n, self.k), self.order, self.options = weight.shape, order, options
        self.weight, self.member = weight, member
        self.mu = torch.zeros(self.n, dtype=torch.float64)
        self.r = torch.zeros(order, self.n, dtype=torch.float64)
        self.c = torch.ones(order, self.k, dtype=torch.float64)
        self.b = torch.ones(order, self.n, self.k, dtype=torch.float64)
        self.cells = [(i, j) for i in range(self.n) for j in range(self.k) if member[i, j]]
        self.start()
        for _ in range(options.iterations):
            self.refine()
            self.choose()
        self.mu, self.r, self.c = half(self.mu), half(self.r), half(self.c)
        self.choose()

    def value(self, i: int, j: int, without: int = -1) -> float:
        parts = [self.r[o, i] * self.c[o, j] * self.b[o, i, j] for o in range(self.order) if o != without]
        return float(self.mu[i] + sum(parts))

    def row(self, i: int) -> list[int]:
        return [j for j in range(self.k) if self.member[i, j]]

    def column(self, j: int) -> list[int]:
        return [i for i in range(self.n) if self.member[i, j]]

    def start(self) -> None:
        if self.options.mean:
            for i in range(self.n):
                self.mu[i] = self.weight[i, self.row(i)].mean() if self.row(i) else 0
        rest = self.weight - self.mu.unsqueeze(1)
        for o in range(self.order):
            for i in range(self.n):
                self.r[o, i] = rest[i, self.row(i)].abs().mean() if self.row(i) else 0
            if self.options.variant == "rc":
                for j in range(self.k):
                    over = [float(abs(rest[i, j]) / self.r[o, i]) if self.r[o, i] else 0 for i in self.column(j)]
                    self.c[o, j] = sum(over) / len(over) if over else 1
            self.b[o] = torch.where(rest < 0, -1.0, 1.0)
            rest = rest - self.r[o].unsqueeze(1) * self.c[o] * self.b[o]

    def refine(self) -> None:
        if self.options.mean:
            for i in range(self.n):
                rest = [float(self.weight[i, j]) - self.value(i, j) for j in self.row(i)]
                self.mu[i] += sum(rest) / len(rest) if rest else 0
        for o in range(self.order):
            pull = {
                (i, j): float(self.b[o, i, j]) * (float(self.weight[i, j]) - self.value(i, j, o)) for i, j in self.cells
            }
            for i in range(self.n):
                below = sum(float(self.c[o, j]) ** 2 for j in self.row(i))
                self.r[o, i] = sum(float(self.c[o, j]) * pull[i, j] for j in self.row(i)) / below if below else 0
            if self.options.variant == "rc":
                for j in range(self.k):
                    below = sum(float(self.r[o, i]) ** 2 for i in self.column(j))
                    above = sum(float(self.r[o, i]) * pull[i, j] for i in self.column(j))
                    self.c[o, j] = above / below if below else 1

    def choose(self) -> None:
        self.r, self.c = self.r.abs(), self.c.abs()
        signs = [(s,) for s in (1, -1)] if self.order == 1 else [(s, t) for s in (1, -1) for t in (1, -1)]
        for i, j in self.cells:
            scales = [float(self.r[o, i] * self.c[o, j]) for o in range(self.order)]
            target = float(self.weight[i, j] - self.mu[i])
            best = min(signs, key=lambda b: abs(target - sum(a * s for a, s in zip(scales, b, strict=True))))
            self.b[:, i, j] = torch.tensor(best, dtype=torch.float64)

    def values(self) -> Tensor:
        values = torch.zeros_like(self.weight)
        for i, j in self.cells:
            values[i, j] = self.value(i, j)
        return values


def slow(weight: Tensor, factor: Factor, options: ArbLLMOptions) -> Tensor:
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(factor)), upper=True)
    work, values = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for columns in torch.arange(weight.shape[1]).split(options.group_size or weight.shape[1]):
        block, diagonal = work[:, columns], upper.diagonal()[columns]
        salient, sparse = partition(block.float(), diagonal.float(), options)  # BiLLM's, tested there
        whole = torch.ones_like(sparse)
        doubled = (~sparse, sparse) if options.bitmap else (whole,)
        zones = [SlowZone(block, part & ~salient, 1, options) for part in (~sparse, sparse)]
        zones += [SlowZone(block, part & salient, 2, options) for part in doubled]
        values[:, columns] = sum(zone.values() for zone in zones)
        rest = slice(int(columns[-1]) + 1, None)
        error = (work - values)[:, columns]
        work[:, rest] -= error / diagonal @ upper[columns, rest]
    return values


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("form", [form for form in FORMS if form["variant"] != "x"], ids=str)
def test_equals_the_slow_implementation(form: dict[str, Any], iterations: int) -> None:
    weight, factor = skewed_weight(5, 34), random_factor(34)
    options = ArbLLMOptions(group_size=16, iterations=iterations, max_salient=5, column_search="weights", **form)
    found = arb_llm.quantize(weight, factor, options).dequantize()
    # A step of float16 where a coefficient lies on the edge between two.
    assert torch.allclose(found.double(), slow(weight, factor, options), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("form", [form for form in FORMS if form["variant"] == "x"], ids=str)
def test_rounds_of_x_equal_the_slow_formula(form: dict[str, Any], rounds: int) -> None:
    weight, metric = skewed_weight(6, 40), hessian_of(random_inputs(200, 40))
    code = quantize_group(weight, torch.ones(40), None, ArbLLMOptions(column_search="weights", **form))
    features, target, s = code.features().double(), weight.double(), metric.double()
    c = code.coefficients.double()
    order = [*range(code.scale_count, len(features)), *range(code.scale_count)]
    for _ in range(rounds):
        for f in order:
            for i in range(6):
                feature = features[f, i]
                residual = target[i] - sum(c[g, i] * features[g, i] for g in order)
                if feature.any():
                    c[f, i] += (feature @ s @ residual) / (feature @ s @ feature)
                    if f < code.scale_count:
                        c[f, i].clamp_(min=0)
    calibrate(weight, code, metric, rounds)
    assert torch.allclose(code.coefficients.double(), c, rtol=1e-3, atol=1e-4)


def test_x_is_given_the_groups_block_of_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: list[Tensor] = []
    monkeypatch.setattr(arb_llm, "calibrate", lambda weight, code, metric, rounds: metrics.append(metric))
    factor = random_factor(40)
    arb_llm.quantize(skewed_weight(5, 40), factor, ArbLLMOptions(variant="x", group_size=16))
    hessian = damped(factor)
    for metric, columns in zip(metrics, [slice(0, 16), slice(16, 32), slice(32, 40)], strict=True):
        assert torch.allclose(metric.double(), hessian[columns, columns], rtol=1e-4, atol=1e-4)


# --- what the paper proves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "options", [{"variant": "plain", "mean": True}, {"variant": "plain"}, {"variant": "rc"}], ids=str
)
def test_theorem_1_the_error_never_rises(options: dict[str, Any], order: int, seed: int) -> None:
    weight = skewed_weight(12, 40, seed)
    member = torch.rand(12, 40, generator=torch.Generator().manual_seed(seed)) < 0.6
    errors = []
    for iterations in range(9):
        zone = fit_zone(weight, member, order, ArbLLMOptions(iterations=iterations, **options))
        values = sum(zone.part(o) for o in range(order)) + (0 if zone.mean is None else zone.mean)
        errors.append(float(((weight - values) * member).square().sum()))
    # Up to the rounding of coefficients to float16.
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    if options != {"variant": "plain"} or order == 2:  # one sign around zero is the best there is at once
        assert errors[-1] < 0.99 * errors[0]


def test_scales_of_a_part_are_averages_over_its_members_alone() -> None:
    weight, member = skewed_weight(6, 30), torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    zone = fit_zone(weight, member, 1, ArbLLMOptions(variant="plain", iterations=4))
    for i in range(6):
        signs = 1 - 2 * zone.negative[0, i, member[i]].double()
        best = (signs * weight[i, member[i]].double()).sum() / len(signs)
        assert zone.rows[0, i] == best.half()


def test_row_and_column_scales_are_the_best_of_rank_one() -> None:
    weight = skewed_weight(20, 32)
    zone = fit_zone(weight, torch.ones_like(weight, dtype=torch.bool), 1, ArbLLMOptions(variant="rc"))
    left, size, right = torch.linalg.svd(weight.abs().double())
    best = size[0] * torch.outer(left[:, 0], right[0])
    assert torch.allclose((zone.rows[0] * zone.columns[0]).double(), best, rtol=2e-3, atol=1e-3)
    assert torch.equal(zone.negative[0], weight < 0)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bitmap", [False, True])
def test_rounds_of_x_lower_the_groups_output_error(bitmap: bool, mean: bool) -> None:
    weight, metric = skewed_weight(12, 40), hessian_of(random_inputs(200, 40))
    options = ArbLLMOptions(variant="x", bitmap=bitmap, mean=mean)

    def error(code: SplitCode) -> float:
        return quadratic(weight - code.values(), metric)

    plain = quantize_group(weight, torch.ones(40), None, options)
    errors = [error(plain)]
    negative, sparse = plain.negative.clone(), plain.sparse.clone()
    for rounds in (1, 2, 8):
        code = quantize_group(weight, torch.ones(40), None, options)
        calibrate(weight, code, metric, rounds)
        errors.append(error(code))
        assert torch.equal(code.negative, negative) and torch.equal(code.sparse, sparse)
        assert (code.coefficients[: code.scale_count] >= 0).all()
    assert all(after < before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], feedback: Feedback) -> None:
    codes: list[SplitCode] = []

    def recording(*arguments: Any) -> SplitCode:
        codes.append(quantize_group(*arguments))
        return codes[-1]

    monkeypatch.setattr(arb_llm, "quantize_group", recording)
    plus = {"refits": 1, "passes": 1} if feedback == "column" else {}
    layout = quantize(skewed_weight(5, 70), group_size=32, iterations=2, feedback=feedback, **plus, **form)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))
    assert (layout.spec.bitmap, layout.spec.column_scales) == (form["bitmap"], form["variant"] == "rc")


def test_plain_without_rounds_and_bitmap_is_billm() -> None:
    weight, factor = skewed_weight(6, 50), random_factor(50)
    options: dict[str, Any] = {"group_size": 20, "mean": False}
    arb = arb_llm.quantize(weight, factor, ArbLLMOptions(variant="plain", bitmap=False, iterations=0, **options))
    found, expected = arb.dequantize(), billm.quantize(weight, factor, BiLLMOptions(**options)).dequantize()
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_each_choice_lowers_the_output_error() -> None:
    hessian = hessian_of(random_inputs(400, 96))
    factor = factorize(hessian, 0.01)

    def error(**options: Any) -> float:
        total = 0.0
        for seed in range(4):
            weight = skewed_weight(24, 96, seed)
            layout = arb_llm.quantize(weight, factor, ArbLLMOptions(group_size=32, **options))
            total += quadratic(layout.dequantize() - weight, hessian)
        return total

    plain: dict[str, Any] = {"variant": "plain", "mean": True}
    x: dict[str, Any] = {"variant": "x", "mean": True}
    assert error(**plain) < error(iterations=0, **plain)
    assert error(**x) < error(**plain)
    assert error(bitmap=True) < error(bitmap=False)
    assert error(feedback="column", refits=2, passes=2) < error(feedback="column") < error()


@pytest.mark.parametrize("feedback", ["diagonal", "column"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1), (4, 24)])
def test_constant_rows_stay_what_they_are(shape: tuple[int, int], form: dict[str, Any], feedback: Feedback) -> None:
    """Among them one of zeros; groups of 8, so that the last may hold one column."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for size in (8, 0, 100):
        found = quantize(rows, group_size=size, iterations=3, feedback=feedback, **form).dequantize()
        # Products of two scales, each rounded to float16.
        assert torch.allclose(found, rows, rtol=4e-3, atol=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_matrix_of_zeros(form: dict[str, Any]) -> None:
    plus: dict[str, Any] = {"feedback": "column", "refits": 1, "passes": 1}
    for options in ({}, plus):
        layout = quantize(torch.zeros(3, 40), group_size=16, **form, **options)
        assert torch.equal(layout.dequantize(), torch.zeros(3, 40))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_always_zero_inputs(form: dict[str, Any]) -> None:
    inputs = random_inputs(100, 40)
    inputs[:, :16] = 0  # the whole first group
    hessian, weight = hessian_of(inputs), skewed_weight(5, 40)
    layout = arb_llm.quantize(weight, factorize(hessian, 0.01), ArbLLMOptions(group_size=16, **form))
    assert torch.equal(layout.dequantize()[:, :16], torch.zeros(5, 16))
    assert quadratic(layout.dequantize() - weight, hessian) < 0.3 * quadratic(weight, hessian)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_salient_columns(form: dict[str, Any]) -> None:
    layout = quantize(skewed_weight(5, 40), group_size=16, max_salient=0, feedback="column", passes=1, **form)
    assert (layout.spec.salient_columns, layout.spec.salient_groups) == (0, 0)


def test_column_scales_have_no_means() -> None:
    with pytest.raises(ValueError, match="rc has column scales in place of means: set mean to false"):
        ArbLLMOptions(variant="rc", mean=True)


def test_deterministic() -> None:
    weight = skewed_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_needs_a_hessian() -> None:
    with pytest.raises(ValueError, match="Hessian"):
        arb_llm.quantize(random_weight(2, 8), None, ArbLLMOptions())


# --- presets ----------------------------------------------------------------------------------------------------------


def test_plus_has_less_error_in_fewer_bits() -> None:
    hessian = hessian_of(random_inputs(1000, 256))
    factor, weight = factorize(hessian, 0.01), skewed_weight(512, 256)

    def measure(preset: str) -> tuple[float, float]:
        recipe = Recipe.load(preset)
        layout = recipe.method.quantize(weight, factor, recipe.options)
        return quadratic(layout.dequantize() - weight, hessian), 8 * sum(layout.items().values()) / weight.numel()

    error, bits = measure("arb-llm-plus")
    assert bits < 2.3
    for paper in ("arb-llm-rc", "arb-llm-x"):
        paper_error, paper_bits = measure(paper)
        assert error < 0.8 * paper_error
        assert bits < paper_bits - 0.4
