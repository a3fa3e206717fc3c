"""The method sign-factors: budgets, scales, metrics, presets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import signbit
from matrices import damped, random_factor, random_weight
from signbit import Recipe, SignbitError
from signbit.layouts import SignFactors
from signbit.methods import sign_factors
from signbit.methods.sign_factors import SignFactorsOptions, largest_rank, quantize

MakeDir = Callable[..., Path]


def options_of(**options: Any) -> SignFactorsOptions:
    return SignFactorsOptions(**{"iterations": 10, **options})


def output_error(weight: Tensor, layout: SignFactors, hessian: Tensor) -> float:
    difference = (weight - layout.dequantize()).double()
    return float(((difference @ hessian) * difference).sum() / ((weight.double() @ hessian) * weight.double()).sum())


def stored_bits(layout: SignFactors) -> float:
    return 8 * sum(layout.items().values()) / (layout.shape[0] * layout.shape[1])


# --- budgets ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(0.05, 6),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["float16", "bfloat16"]),
)
@settings(deadline=None, max_examples=200)
def test_the_budget_is_never_exceeded_and_one_rank_more_would(
    n: int, m: int, bits: float, paths: int, rank_scales: bool, dtype: str
) -> None:
    options = options_of(bits=bits, paths=paths, rank_scales=rank_scales, scale_dtype=dtype)

    def layout(rank: int) -> SignFactors:
        scales = [torch.zeros(paths, length, dtype=options.storage) for length in (n, rank, m)]
        inner = scales[1] if rank_scales else None
        U, V = torch.zeros(paths, n, rank).bool(), torch.zeros(paths, rank, m).bool()
        return SignFactors.encode(U, V, scales[0], inner, scales[2], dtype)

    try:
        rank = largest_rank((n, m), options)
    except SignbitError as refused:
        assert "do not pay" in str(refused) and "\n" not in str(refused)
        assert stored_bits(layout(1)) > bits
        return
    assume(rank < 2000)
    assert stored_bits(layout(rank)) <= bits < stored_bits(layout(rank + 1))


@given(st.integers(20, 60), st.integers(20, 60), st.floats(2, 5))
@settings(deadline=None, max_examples=20)
def test_what_is_quantized_keeps_to_the_budget(n: int, m: int, bits: float) -> None:
    try:
        layout = quantize(random_weight(n, m), random_factor(m), options_of(bits=bits, iterations=2))
    except SignbitError:
        assume(False)
    assert stored_bits(layout) <= bits


def test_a_rank_is_taken_as_it_is() -> None:
    layout = quantize(random_weight(20, 30), random_factor(30), options_of(rank=7, bits=0.01))
    assert layout.spec.rank == 7


def test_a_matrix_that_is_too_small_is_refused_with_what_it_takes() -> None:
    with pytest.raises(
        SignbitError, match=r"1 bits a weight do not pay.*4\.19.*16 x 16.*raise bits, set a rank, or skip"
    ):
        quantize(random_weight(16, 16), random_factor(16), options_of())


# --- scales and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["admm", "svid"])
@pytest.mark.parametrize("metric", ["hessian", "diagonal", "none"])
@pytest.mark.parametrize("rank_scales", [True, False])
@pytest.mark.parametrize("paths", [1, 2])
def test_scales_are_positive_and_of_one_size(solver: str, metric: str, rank_scales: bool, paths: int) -> None:
    weight, factor = random_weight(40, 50), random_factor(50)
    options = options_of(solver=solver, metric=metric, rank_scales=rank_scales, paths=paths, rank=12, refits=1)
    layout = quantize(weight, factor, options)
    assert layout.spec.rank_scales == rank_scales and layout.spec.paths == paths
    h, g = layout.get_buffer("out_scales").float(), layout.get_buffer("in_scales").float()
    assert (h >= 0).all() and (g >= 0).all()
    assert torch.allclose(h.square().mean(1), g.square().mean(1), rtol=0.01)
    if rank_scales:
        inner = layout.get_buffer("rank_scales").float()
        assert (inner >= 0).all() and torch.allclose(inner.mean(1), torch.ones(paths), rtol=0.01)
    assert 0 < output_error(weight, layout, damped(factor)) < 1


@pytest.mark.parametrize("rank_scales", [True, False])
@pytest.mark.parametrize("metric", ["hessian", "diagonal"])
def test_refits_only_help(rank_scales: bool, metric: str) -> None:
    weight, factor = random_weight(40, 50), random_factor(50)
    errors = [
        output_error(
            weight,
            quantize(weight, factor, options_of(rank=20, refits=refits, rank_scales=rank_scales, metric=metric)),
            damped(factor),
        )
        for refits in (0, 1, 4)
    ]
    assert errors[2] <= errors[1] * 1.001 and errors[1] < errors[0]


def test_each_refit_is_the_least_squares_solution() -> None:
    """No scale can be moved to lower the error."""
    weight, factor = random_weight(20, 30), random_factor(30)
    layout = quantize(weight, factor, options_of(rank=8, refits=100))
    hessian = damped(factor)
    least = output_error(weight, layout, hessian)
    for name in ("out_scales", "rank_scales", "in_scales"):
        for entry in range(3):
            for step in (0.98, 1.02):
                tensors = {key: tensor.clone() for key, tensor in layout.named_buffers()}
                tensors[name][0, entry] *= step
                assert output_error(weight, SignFactors(layout.spec, tensors), hessian) > least * 0.9999


def test_the_more_it_knows_of_inputs_the_less_they_err() -> None:
    weight, factor = random_weight(64, 80), random_factor(80)
    errors = [
        output_error(
            weight, quantize(weight, factor, options_of(metric=metric, rank=40, iterations=60)), damped(factor)
        )
        for metric in ("none", "diagonal", "hessian")
    ]
    assert errors[2] < 0.9 * min(errors[:2])


def test_residual_paths_lower_the_error() -> None:
    weight, factor = random_weight(40, 50), random_factor(50)
    one, two = (
        output_error(weight, quantize(weight, factor, options_of(rank=16, paths=paths)), damped(factor))
        for paths in (1, 2)
    )
    assert two < 0.8 * one


def test_shrinkage_ends_where_nothing_is_known() -> None:
    weight, factor = random_weight(20, 30), random_factor(30)
    shrunk = quantize(weight, factor, options_of(metric="diagonal", shrinkage=1.0, rank=9, refits=0))
    blind = quantize(weight, None, options_of(metric="none", rank=9, refits=0))
    assert torch.allclose(shrunk.dequantize(), blind.dequantize(), atol=0.02)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3])
@pytest.mark.parametrize("metric", ["hessian", "none"])
def test_the_size_of_weights_does_not_matter(size: float, metric: str) -> None:
    weight, factor = random_weight(20, 30), random_factor(30)
    one, other = (quantize(s * weight, factor, options_of(metric=metric, rank=9)).dequantize() for s in (1.0, size))
    assert float((other / size - one).norm() / one.norm()) < 0.05


@pytest.mark.parametrize("solver", ["admm", "svid"])
@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (3, 5)])
def test_odd_matrices(solver: str, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    layout = quantize(weight, random_factor(shape[1]), options_of(solver=solver, rank=6))
    assert torch.isfinite(layout.dequantize()).all()
    zeros = quantize(torch.zeros(shape), random_factor(shape[1]), options_of(solver=solver, rank=6))
    assert not zeros.dequantize().any()


def test_metrics_that_need_calibration_say_so() -> None:
    with pytest.raises(SignbitError, match=r"metric hessian needs calibration.*samples.*none"):
        quantize(random_weight(20, 30), None, options_of(rank=4))
    assert quantize(random_weight(20, 30), None, options_of(rank=4, metric="none"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("group_size", 128), ("mean", True), ("bits", 0), ("rank", 0), ("solver", "x"), ("shrinkage", 0.5)],
)
def test_options_that_make_no_sense_are_refused(key: str, value: Any) -> None:
    with pytest.raises(SignbitError, match=key):
        Recipe({"method": "sign-factors", key: value})


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sign-factors", "dbf", "nanoquant", "littlebit"])
def test_presets_quantize_a_model_within_their_budget(
    name: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    # Tiny matrices pay 16 (n + m) / (n m) bits for scales.
    changes = {"bits": 3.0, "iterations": 4, "calib": str(text_file), "seqlen": 32}
    recipe = Recipe.load(name, {**changes, "samples": 0 if name == "littlebit" else 4})
    report = signbit.quantize(tiny_dir("qwen2"), tmp_path / "out", recipe, device="cpu")
    found = signbit.inspect(tmp_path / "out")
    assert recipe.method is sign_factors.METHOD
    assert report.layers and 2 < found["bits_per_weight"] <= 3.0
    assert all(layer["layout"] == "sign_factors" and layer["bits_per_weight"] <= 3.0 for layer in found["layers"])
    model, _ = signbit.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20).unsqueeze(0)).logits).all()
