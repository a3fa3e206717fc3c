from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from choosing import choose_column
from matrices import damped, half, hessian_of, random_factor, random_inputs, random_weight
from signbit.calibration.hessian import Factor, factorize, quadratic
from signbit.errors import SignbitError
from signbit.layouts import Partial
from signbit.layouts.bits import as_signs
from signbit.layouts.positions import STRIP_ROWS
from signbit.methods import pb_llm
from signbit.methods.options import Feedback
from signbit.methods.pb_llm import PartialCode, PBLLMOptions, find_salient, fit_codes, most
from signbit.methods.rounding import round_in_turn
from signbit.methods.salience import salience
from signbit.recipe import Recipe

FEEDBACKS = get_args(Feedback)


def quantize(weight: Tensor, seed: int = 0, **options: Any) -> Partial:
    return pb_llm.quantize(weight, random_factor(weight.shape[1], seed), PBLLMOptions(**options))


def preset(name: str) -> dict[str, Any]:
    recipe = Recipe.load(name)
    assert recipe.method is pb_llm.METHOD
    return recipe.options.model_dump()


def new_code(
    salient: Tensor, levels: int, scale: Tensor, mean: Tensor | None, code_scale: Tensor, code_offset: Tensor | None
) -> PartialCode:
    """One in which nothing is chosen yet, for salient weights [n, k]."""
    columns = salient.T.contiguous()
    level = torch.full_like(columns, 0.5, dtype=torch.float32)
    return PartialCode(level, columns, levels, scale, mean, code_scale, code_offset)


def salient_of(layout: Partial) -> Tensor:
    """Which weights are salient, bool [n, m]."""
    n, m = layout.shape
    strip, place, _ = layout._salient(0, len(layout.ends))
    marked = torch.zeros(n * m, dtype=torch.bool)
    marked[strip * STRIP_ROWS * m + place] = True
    return marked.view(n, m)


# --- the method, step by step as pb_llm.py tells it, in float64 -------------------------------------------------------


def slow_salient(weight: Tensor, diagonal: Tensor, options: PBLLMOptions) -> Tensor:
    scores = weight.abs() if options.salience == "magnitude" else weight.square() / diagonal.square()
    order = (-scores.flatten()).argsort(stable=True)
    marked = torch.zeros(weight.numel(), dtype=torch.bool)
    marked[order[: round(options.salient_fraction * weight.numel())]] = True
    return marked.view_as(weight)


def slow_ordinary(row: Tensor, mean: bool) -> Tensor:
    """The two values of a row's binarized weights."""
    if not len(row):
        return torch.zeros(2, dtype=torch.float64)
    center = half(row.mean()) if mean else 0.0
    scale = half((row - center).abs().mean())
    return torch.stack([center - scale, center + scale])


def slow_levels(within: Tensor, bits: int, mean: bool) -> Tensor:
    """The 2^bits values of a row's codes."""
    if not len(within):
        return torch.zeros(1, dtype=torch.float64)
    low, high = (within.min(), within.max()) if mean else (-within.abs().max(), within.abs().max())
    levels = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    return half((high - low) / (2**bits - 1)) * levels + half((low + high) / 2)


def slow(weight: Tensor, factor: Factor, options: PBLLMOptions) -> Tensor:
    """GPTQ's sweep, one column of the whole matrix after the other."""
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(factor)), upper=True)
    original, work = weight.double(), weight.double()
    for columns in torch.arange(weight.shape[1]).split(options.group_size or weight.shape[1]):
        group = original[:, columns]
        marked = slow_salient(group, upper.diagonal()[columns], options)
        for place, j in enumerate(columns.tolist()):
            for i, row in enumerate(group):
                if marked[i, place]:
                    within = original[i] if options.code_scope == "row" else row[marked[i]]
                    choices = slow_levels(within, options.code_bits, options.mean)
                else:
                    averaged = row * ~marked[i] if options.averages == "group" else row[~marked[i]]
                    choices = slow_ordinary(averaged, options.mean)
                value = choices[(choices - work[i, j]).abs().argmin()]
                error = (work[i, j] - value) / upper[j, j]
                work[i, j] = value
                if options.feedback == "column":
                    work[i, j + 1 :] -= error * upper[j, j + 1 :]
    return work


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": False},
        {"salience": "magnitude"},
        {"salient_fraction": 0.0},
        {"salient_fraction": 1.0, "code_bits": 4},
        {"salient_fraction": 0.5, "code_bits": 2},
        {"code_scope": "group"},
        {"code_scope": "group", "code_bits": 4, "salient_fraction": 0.3},
        {"code_scope": "group", "code_bits": 3, "mean": False},
        {"feedback": "none"},
        {"group_size": 0},
        {"averages": "group"},
        {"averages": "group", "salient_fraction": 0.5, "mean": False},
    ],
    ids=str,
)
def test_equals_the_slow_implementation(options: dict[str, Any], seed: int) -> None:
    weight, factor = random_weight(6, 50, seed), random_factor(50, seed)
    chosen = PBLLMOptions(**{"group_size": 20, **options})
    found = pb_llm.quantize(weight, factor, chosen).dequantize().double()
    # Float32 and float64 may choose differently at the edge between two values, and a row goes another way from there.
    same = torch.isclose(found, slow(weight, factor, chosen), rtol=2e-3, atol=2e-3).all(1)
    assert same.sum() >= 5


# --- what the released code gets wrong --------------------------------------------------------------------------------


def test_averages_over_the_group_shrink_scales_by_the_share_of_salient_weights() -> None:
    """What the released code does, and the preset with it."""
    weight = random_weight(20, 64)
    of_rest, of_group = (
        quantize(weight, averages=averages, mean=False, group_size=0).scales.float()
        for averages in ("binarized", "group")
    )
    salient = quantize(weight, mean=False, group_size=0).salient_places()
    counts = torch.bincount(salient // 64, minlength=20).unsqueeze(1)
    torch.testing.assert_close(of_group, of_rest * (64 - counts) / 64, rtol=2e-3, atol=0)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("mean", [False, True])
def test_the_scale_of_the_rest_is_the_least_squares_one(fraction: float, mean: bool) -> None:
    weight = random_weight(20, 64)
    layout = quantize(
        weight, salient_fraction=fraction, mean=mean, feedback="none", group_size=0, scale_dtype="float16"
    )
    rest = ~salient_of(layout)
    values = layout.dequantize()
    for i in range(20):
        row, found = weight[i][rest[i]], values[i][rest[i]]
        center = float(row.mean()) if mean else 0.0
        signs = torch.where(row < center, -1.0, 1.0)
        best = float(((row - center) * signs).mean())  # argmin over a of |row - center - a signs|^2
        assert (found - center).abs().max() == pytest.approx(best, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("scope", ["row", "group"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_codes_keep_signs_and_are_within_half_a_step(shift: float, bits: int, scope: str, mean: bool) -> None:
    weight = random_weight(20, 64) + shift
    options: dict[str, Any] = {"salient_fraction": 1.0, "code_bits": bits, "code_scope": scope, "mean": mean}
    layout = quantize(weight, **options, feedback="none", group_size=32)
    steps = layout.code_scales.float().repeat_interleave(64 // layout.code_scales.shape[1], dim=1)
    error = (layout.dequantize() - weight).abs()
    rounding = 2e-3 * weight.abs().amax(1, keepdim=True)  # of scale and offset to float16
    assert (error <= steps / 2 + rounding).all()


@pytest.mark.parametrize("size", [32, 0])
@pytest.mark.parametrize("scope", ["row", "group"])
def test_without_means_everything_is_symmetric(scope: str, size: int) -> None:
    """Weights of the other sign get the other sign and are the same otherwise, and no middle is stored."""
    plus = {key: value for key, value in preset("pb-llm-plus").items() if scope == "group" or key != "passes"}
    options = {**plus, "code_scope": scope, "group_size": size, "refits": 2 * (scope == "group")}
    weight = random_weight(20, 64) + 0.3
    layout, opposite = quantize(weight, **options), quantize(-weight, **options)
    assert torch.equal(layout.dequantize(), -opposite.dequantize())
    assert {"means", "code_offsets"}.isdisjoint(layout.state_dict())


@pytest.mark.parametrize("mean", [False, True])
def test_weights_beyond_the_range_take_its_end(mean: bool) -> None:
    weight = torch.linspace(-1, 1, 8).expand(2, 8).contiguous()
    everything = torch.ones(2, 8, dtype=torch.bool)
    scale, offset = fit_codes(weight, everything, everything, torch.ones(8), PBLLMOptions(code_bits=3, mean=mean))
    zero = torch.zeros_like(scale)
    code = new_code(everything, 4, zero, zero if mean else None, scale, offset)
    round_in_turn(code, 100 * weight.T)
    assert torch.allclose(code.values(), weight.sign(), atol=1e-3)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("metric", ["hessian", "magnitude", "error"])
def test_just_as_many_are_salient_as_asked(fraction: float, metric: str) -> None:
    for weight in (random_weight(20, 72), torch.ones(20, 72), torch.zeros(20, 72)):
        layout = quantize(weight, salient_fraction=fraction, salience=metric, group_size=32)
        counts = [int(part.sum()) for part in salient_of(layout).split(32, dim=1)]
        assert counts == [round(fraction * 20 * k) for k in (32, 32, 8)]
        assert layout.spec.salient == sum(counts)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [0, 32])
def test_two_tails_are_the_lowest_and_highest_values_of_the_matrix(fraction: float, size: int) -> None:
    weight = random_weight(20, 72) + 0.3
    found = salient_of(quantize(weight, salient_fraction=fraction, salience="two-tails", group_size=size))
    half_of_them, order = round(fraction / 2 * 1440), weight.flatten().argsort()
    wanted = torch.zeros(1440, dtype=torch.bool)
    wanted[order[:half_of_them]] = True
    wanted[order[1440 - half_of_them :]] = True
    assert torch.equal(found, wanted.view(20, 72))


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_two_tails_of_equal_weights_are_just_as_many(fraction: float) -> None:
    for weight in (torch.ones(20, 72), torch.zeros(20, 72)):
        layout = quantize(weight, salient_fraction=fraction, salience="two-tails")
        assert layout.spec.salient == round(fraction * 1440)


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_dtype": "bfloat16"},
        {"mean": False, "scale_dtype": "bfloat16"},
        {"code_scope": "group", "refits": 1, "passes": 1},
        {"code_scope": "group", "refits": 2, "mean": False, "salience": "error", "code_bits": 3},
        {"salient_fraction": 0.0},
        {"salient_fraction": 1.0},
    ],
    ids=str,
)
def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch, feedback: Feedback, options: dict[str, Any]) -> None:
    if feedback == "none":
        options = {**options, "refits": 0}
    codes: list[PartialCode] = []

    def recording(*arguments: Any) -> PartialCode:
        codes.append(PartialCode(*arguments))
        return codes[-1]

    monkeypatch.setattr(pb_llm, "PartialCode", recording)
    layout = quantize(random_weight(20, 70), group_size=32, feedback=feedback, **options)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_reassigned_weights_get_the_nearest_of_their_values(mean: bool, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    salient = torch.rand(60, 4, generator=generator) < 0.5
    scale, mu, step, offset = (torch.randn(60, generator=generator).half() for _ in range(4))
    levels = 2 ** (bits - 1)
    code = new_code(salient, levels, scale.abs(), mu if mean else None, step.abs(), offset if mean else None)
    drifted = torch.randn(60, generator=generator)
    found = choose_column(code, 2, drifted)
    center, middle = (x.double() * mean for x in (mu, offset))
    grid = torch.arange(-levels, levels, dtype=torch.float64) + 0.5
    for i in range(60):
        choices = center[i] + scale[i].double() * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        if salient[i, 2]:
            choices = middle[i] + step[i].double() * grid
        nearest = (choices - drifted[i]).abs().min()
        assert (found[i].double() - drifted[i]).abs() == pytest.approx(float(nearest), abs=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_zero_is_positive_whatever_its_sign(mean: bool) -> None:
    salient = torch.tensor([[True], [False]])
    one, zero = torch.ones(2, dtype=torch.float16), torch.zeros(2, dtype=torch.float16)
    code = new_code(salient, 4, one, zero if mean else None, one, zero if mean else None)
    for weight in (0.0, -0.0):
        assert choose_column(code, 0, torch.full((2,), weight)).tolist() == [0.5, 1.0]
        assert not code.negative.any() and not code.q.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_between_two_values_either_is_taken_and_beyond_all_the_last(dtype: torch.dtype) -> None:
    one, middle = torch.ones(1, dtype=dtype), torch.full((1,), 2.0, dtype=dtype)
    code = new_code(torch.tensor([[True, False]]), 4, one, middle, one, middle)
    for weight in (-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        assert abs(float(choose_column(code, 0, torch.tensor([weight]))) - weight) == 0.5
    for weight in (-3e4, -2.5, 6.5, 3e4):
        assert float(choose_column(code, 0, torch.tensor([weight]))) == (5.5 if weight > 2 else -1.5)
    for weight in (-3e4, 1.9999999, 2.0, 3e4):
        found = choose_column(code, 1, torch.tensor([weight]))
        assert float(found) == (3.0 if weight >= 2 else 1.0)
        assert torch.equal(found, code.values()[:, 1]) and not code.q[1].any()


def test_codes_that_are_all_alike_still_have_a_sign() -> None:
    """Least squares can make a step of it."""
    zero = torch.zeros(3, dtype=torch.float16)
    code = new_code(torch.ones(3, 2, dtype=torch.bool), 128, zero, None, zero, None)
    round_in_turn(code, torch.tensor([[-0.5, 0.0, 2.0], [1e-6, -1e-6, -3.0]]))
    assert code.negative.T.tolist() == [[True, False], [False, True], [False, True]]
    assert not code.q.any() and not code.values().any()


def test_new_coefficients_count_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    salient = torch.rand(8, 12, generator=generator) < 0.3
    one = torch.ones(8, dtype=torch.float16)
    code = new_code(salient, 8, one, one, one, one)
    weights = torch.randn(8, generator=generator)
    choose_column(code, 3, weights)
    code.set_coefficients(torch.rand(4, 8, generator=generator))
    fresh = new_code(salient, 8, code.scale, code.mean, code.code_scale, code.code_offset)
    assert torch.equal(choose_column(code, 3, weights), choose_column(fresh, 3, weights))


@pytest.mark.parametrize("mean", [False, True])
def test_values_are_the_features_times_the_coefficients(mean: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    salient, negative = (torch.rand(8, 12, generator=generator) < share for share in (0.3, 0.5))
    zero = torch.zeros(8, dtype=torch.float16)
    middle = zero if mean else None
    code = new_code(salient, 8, zero, middle, zero, middle)
    q = torch.randint(0, 8, (8, 12), generator=generator) * salient
    code.level = (as_signs(negative) * (q + 0.5)).T
    coefficients = torch.rand(2 + 2 * mean, 8, generator=generator).half().float()
    code.set_coefficients(coefficients)
    assert torch.allclose(code.values(), torch.einsum("fn,fnk->nk", coefficients, code.features()), atol=1e-6)


def test_the_most_are_chosen_without_regard_to_ties() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]])
    assert most(scores, 0.5).tolist() == [[False, True, True], [False, False, True]]
    assert most(scores, 1 / 3).tolist() == [[False, True, False], [False, False, True]]


def test_a_weight_as_large_as_the_scale_needs_no_code() -> None:
    """However much its input matters: only what binarizing would hurt is salient by error."""
    weight = torch.where(random_weight(20, 32) < 0, -1.0, 1.0)
    weight[:, 7] = 0.1
    diagonal = torch.ones(32)
    diagonal[3] = 0.1
    for metric, column in (("hessian", 3), ("error", 7)):
        marked = find_salient(weight, diagonal, PBLLMOptions(salience=metric, salient_fraction=1 / 32, mean=False))
        assert marked.sum(0).nonzero().tolist() == [[column]]


def test_by_magnitude_and_by_hessian_are_the_shared_metrics() -> None:
    weight, diagonal = random_weight(20, 32), 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(0))
    for metric in ("hessian", "magnitude"):
        marked = find_salient(weight, diagonal, PBLLMOptions(salience=metric))
        scores = salience(weight, diagonal, metric)
        assert scores[marked].min() >= scores[~marked].max()


@pytest.mark.parametrize("mean", [False, True])
def test_a_searched_range_has_less_error(mean: bool) -> None:
    weight = random_weight(20, 64).pow(3)
    everything, importance = torch.ones_like(weight, dtype=torch.bool), 0.5 + torch.rand(64)
    losses = []
    for candidates in (1, 9, 33):
        options = PBLLMOptions(code_bits=3, range_candidates=candidates, mean=mean)
        scale, offset = fit_codes(weight, everything, everything, importance, options)
        zero = torch.zeros_like(scale)
        code = new_code(everything, 4, zero, zero if mean else None, scale, offset)
        round_in_turn(code, weight.T)
        losses.append(((code.values() - weight).square() * importance).sum(1))
    assert (losses[1] <= losses[0]).all() and (losses[2] <= losses[1]).all()
    assert losses[1].sum() < 0.8 * losses[0].sum()


# --- degenerate input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"code_scope": "group"}, preset("pb-llm-plus")], ids=["row", "group", "plus"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1), (4, 24)])
def test_constant_rows_stay_what_they_are(shape: tuple[int, int], feedback: Feedback, options: dict[str, Any]) -> None:
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for size in (8, 0):
        chosen = {**options, "group_size": size, "feedback": feedback}
        if feedback == "none":
            chosen["refits"] = 0
        layout = quantize(rows, **chosen)
        # A step of float16: least squares divides a value among coefficients that are alike.
        assert torch.allclose(layout.dequantize(), rows, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["pb-llm", "pb-llm-plus"])
def test_a_matrix_of_zeros(name: str) -> None:
    assert torch.equal(quantize(torch.zeros(3, 40), **preset(name)).dequantize(), torch.zeros(3, 40))


@pytest.mark.parametrize("name", ["pb-llm", "pb-llm-plus"])
def test_always_zero_inputs(name: str) -> None:
    inputs = random_inputs(100, 40)
    inputs[:, :16] = 0  # the whole first group
    hessian = hessian_of(inputs)
    weight = random_weight(20, 40)
    weight[:, :16] *= 100
    layout = pb_llm.quantize(weight, factorize(hessian, 0.01), PBLLMOptions(**{**preset(name), "group_size": 16}))
    marked = salient_of(layout)[:, 16:].float().mean()
    assert marked == pytest.approx(preset(name).get("salient_fraction", 0.1), abs=0.02)
    difference = layout.dequantize() - weight
    assert quadratic(difference, hessian) < 0.3 * quadratic(weight, hessian)


@pytest.mark.parametrize(("size", "stored"), [(0, 0), (40, 0), (41, 0), (39, 39), (128, 0)])
def test_a_group_of_the_whole_row_is_stored_as_such(size: int, stored: int) -> None:
    assert quantize(random_weight(5, 40), group_size=size).spec.group_size == stored


# --- what it reaches --------------------------------------------------------------------------------------------------


def error(weight: Tensor, hessian: Tensor, **options: Any) -> tuple[float, int]:
    """Relative output error, and bytes."""
    layout = pb_llm.quantize(weight, factorize(hessian, 0.01), PBLLMOptions(**options))
    found = quadratic(layout.dequantize() - weight, hessian) / quadratic(weight, hessian)
    return found, sum(layout.items().values())


def test_each_step_lowers_the_output_error() -> None:
    inputs = random_inputs(800, 128)
    inputs[:, ::16] *= 4  # some matter more
    hessian, weight = hessian_of(inputs), random_weight(64, 128)
    base = {"group_size": 32}
    found = error(weight, hessian, **base)[0]
    assert (
        found < error(weight, hessian, **base, feedback="block")[0] < error(weight, hessian, **base, feedback="none")[0]
    )
    assert found < error(weight, hessian, **base, salience="magnitude")[0]
    assert found < error(weight, hessian, **base, salient_fraction=0.05)[0]
    coded = {"code_bits": 4, "mean": False, "code_scope": "group", "group_size": 0}
    found = error(weight, hessian, **coded)[0]
    assert error(weight, hessian, **coded, salience="error")[0] < found
    assert error(weight, hessian, **coded, refits=2)[0] < found
    assert error(weight, hessian, **coded, passes=2)[0] < found


@pytest.mark.parametrize("seed", range(3))
def test_plus_has_less_error_and_no_more_bits(seed: int) -> None:
    hessian, weight = hessian_of(random_inputs(1000, 256, seed)), random_weight(256, 256, seed)
    paper, plus = (error(weight, hessian, **preset(name)) for name in ("pb-llm", "pb-llm-plus"))
    assert plus[0] < 0.8 * paper[0]
    assert plus[1] < paper[1]


def test_deterministic() -> None:
    weight = random_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_fitted_again_is_refused() -> None:
    for option in ("refits", "passes"):
        with pytest.raises(SignbitError, match="code_scope group"):
            Recipe({"method": "pb-llm", option: 1})


def test_needs_a_hessian() -> None:
    with pytest.raises(ValueError, match="Hessian"):
        pb_llm.quantize(random_weight(2, 8), None, PBLLMOptions())
