import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import signbit
from choosing import choose_column
from matrices import binarized, damped, half, hessian_of, random_factor, random_inputs, random_weight, skewed_weight
from signbit import Recipe, SignbitError
from signbit.calibration.hessian import Factor, factorize, quadratic
from signbit.layouts import Structured
from signbit.layouts.bits import unpack_bits
from signbit.methods import stbllm
from signbit.methods.options import Feedback
from signbit.methods.stbllm import StbllmOptions, StructuredCode, quantize_group
from tiny import SMALL_RECIPE

FEEDBACKS = get_args(Feedback)


def quantize(weight: Tensor, seed: int = 0, **options: Any) -> Structured:
    return stbllm.quantize(weight, random_factor(weight.shape[1], seed), StbllmOptions(**options))


def kept_by(layout: Structured) -> Tensor:
    """Which weights a layout keeps: give all of them the value 1."""
    ones = {name: tensor.clone() for name, tensor in layout.state_dict().items()}
    for name, tensor in ones.items():
        if name.endswith("scales"):
            tensor.zero_()
        elif name.endswith("means"):
            tensor.fill_(1)
    if not layout.spec.mean:
        ones["scales"].fill_(1)
        ones.get("salient_scales", torch.empty(1, 1, 2))[..., 0] = 1
    return Structured(layout.spec, ones).dequantize() != 0


# --- the method, step by step as the paper and stbllm.py tell it, in float64 ------------------------------------------


def fit(x: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Center, and scale times signs, of one row's weights x [k]."""
    center = half(x.mean()) if mean and len(x) else torch.zeros((), dtype=torch.float64)
    scale = half((x - center).abs().mean()) if len(x) else center
    return center, scale * torch.where(x < center, -1.0, 1.0).double()


def slow_importance(weight: Tensor, original: Tensor, at: slice, factor: Factor, metric: str) -> Tensor:
    if metric in ("hessian", "magnitude"):
        return weight.square() / factor.diagonal[at].square() if metric == "hessian" else weight.abs()
    size = original.abs()
    rows, columns = size.sum(1, keepdim=True), size.sum(0)
    diagonal = damped(factor).diagonal()
    norms = (diagonal - factor.damping / (1 + factor.damping) * diagonal.mean()).sqrt()[at]
    relative = weight.abs() / rows + weight.abs() / columns[at]
    if metric == "ria":
        return relative * norms.sqrt()
    every = size / rows + size / columns
    return (relative - every.mean()) / every.std(correction=0) * norms


def slow_keep(scores: Tensor, keep: int, of: int) -> Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores):
        for start in range(0, len(row), of):
            cell = row[start : start + of]
            best = (-cell).argsort(stable=True)[: -(-len(cell) * keep // of)]
            kept[i, start + best] = True
    return kept


def slow_count(searched: Tensor, kept: Tensor, options: StbllmOptions) -> int:
    errors = []
    for count in range(1, min(options.max_salient, searched.shape[1]) + 1):
        error = 0.0
        for row, inside in zip(searched, kept, strict=True):
            for at, times in ((slice(0, count), 2), (slice(count, None), 1 + (options.column_search == "salience"))):
                part = row[at][inside[at]].unsqueeze(0)
                error += float((binarized(part, times) - part).square().sum())
        errors.append(error)
    return 1 + errors.index(min(errors)) if errors else 0


def slow_cuts(key: Tensor, inside: Tensor, options: StbllmOptions) -> list[float]:
    fractions = np.linspace(0.1, 0.9, options.region_candidates)
    candidates = np.quantile(key[inside].numpy(), fractions, method="nearest")
    if options.regions == 1:
        return []
    sets = [[p] if options.regions == 2 else [p, 2 * p] for p in candidates.tolist()]
    errors = []
    for cuts in sets:
        error = 0.0
        for row, member in zip(key, inside, strict=True):
            for part in regions_of(row, member, cuts):
                x = row[part]
                error += float((x - x.mean()).square().sum()) if len(x) else 0.0
        errors.append(error)
    return sets[errors.index(min(errors))]


def regions_of(row: Tensor, member: Tensor, cuts: list[float]) -> list[Tensor]:
    edges = [-1.0, *cuts, float("inf")]
    return [member & (row > low) & (row <= high) for low, high in pairwise(edges)]


def slow_group(weight: Tensor, kept: Tensor, diagonal: Tensor, options: StbllmOptions) -> Tensor:
    scores = (weight.square() / diagonal.square() if options.salience == "hessian" else weight.abs()) * kept
    ranking = (-scores.sum(0)).argsort(stable=True)
    searched = scores if options.column_search == "salience" else weight.abs() * kept
    salient = torch.zeros(weight.shape[1], dtype=torch.bool)
    salient[ranking[: slow_count(searched[:, ranking], kept[:, ranking], options)]] = True
    key = scores if options.region_search == "salience" else weight.abs()
    cuts = slow_cuts(key, kept & ~salient, options) if bool((kept & ~salient).any()) else [0.0]
    values = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        at = kept[i] & salient
        center, first = fit(row[at], options.mean)
        center2, second = fit(row[at] - (center + first), options.mean)
        values[i, at] = half(center + center2) + first + second
        for part in regions_of(key[i], kept[i] & ~salient, cuts):
            center, signs = fit(row[part], options.mean)
            values[i, part] = center + signs
    return values


def slow(weight: Tensor, factor: Factor, options: StbllmOptions) -> tuple[Tensor, Tensor]:
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(factor)), upper=True)
    original = weight.double()
    work, values = original.clone(), torch.zeros_like(original)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    size = options.group_size or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        at = slice(start, min(start + size, weight.shape[1]))
        seen = original if options.prune_on == "original" else work
        scores = slow_importance(seen[:, at], original, at, factor, options.importance)
        mask[:, at] = slow_keep(scores, options.keep, options.of)
        values[:, at] = slow_group(work[:, at], mask[:, at], upper.diagonal()[at], options)
        error = (work - values)[:, at]
        if options.feedback == "diagonal":
            work[:, at.stop :] -= error / upper.diagonal()[at] @ upper[at, at.stop :]
        elif options.feedback == "block":
            work[:, at.stop :] -= error @ torch.linalg.inv(upper[at, at]) @ upper[at, at.stop :]
    return values, mask


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": False},
        {"importance": "si"},
        {"importance": "hessian", "keep": 5},
        {"importance": "magnitude", "keep": 3, "of": 4},
        {"prune_on": "original"},
        {"column_search": "weights"},
        {"region_search": "salience"},
        {"regions": 2, "salience": "magnitude"},
        {"regions": 1, "max_salient": 0},
        {"max_salient": 0, "keep": 8},
        {"max_salient": 3, "column_search": "weights"},
        {"feedback": "none"},
        {"feedback": "block"},
        {"group_size": 0, "max_salient": 20},
    ],
    ids=str,
)
def test_equals_the_slow_implementation(options: dict[str, Any], seed: int) -> None:
    weight, factor = skewed_weight(6, 50, seed), random_factor(50, seed)
    chosen = StbllmOptions(**{"group_size": 24, "region_candidates": 20, **options})
    layout = stbllm.quantize(weight, factor, chosen)
    expected, mask = slow(weight, factor, chosen)
    assert torch.equal(layout.dequantize() != 0, mask & (expected != 0))
    # A step of float16 where a scale lies on the edge between two.
    assert torch.allclose(layout.dequantize().double(), expected, rtol=2e-3, atol=2e-3)


# --- what is pruned stays pruned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("keep", "of", "regions"), [(4, 8, 3), (1, 4, 1), (5, 16, 2)])
def test_pruned_stays_pruned(feedback: Feedback, mean: bool, keep: int, of: int, regions: int) -> None:
    """Exactly N of every M, through feedback, refits, passes and packing: the released code loses its mask."""
    rounds = 0 if feedback == "none" else 2
    layout = quantize(
        skewed_weight(7, 82),
        keep=keep,
        of=of,
        group_size=2 * of,
        regions=regions,
        max_salient=0 if regions == 1 else 5,
        mean=mean,
        feedback=feedback,
        refits=rounds,
        passes=rounds,
    )
    kept = kept_by(layout)
    assert not layout.dequantize()[~kept].any()
    for start in range(0, 82, of):
        cell = kept[:, start : start + of]
        assert (cell.sum(1) == -(-cell.shape[1] * keep // of)).all()


@pytest.mark.parametrize("mean", [False, True])
def test_assigning_never_brings_a_pruned_weight_back(mean: bool) -> None:
    weight = skewed_weight(30, 24)
    kept = torch.rand(30, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    code = quantize_group(weight, kept, torch.ones(24), StbllmOptions(mean=mean, column_search="weights"))
    for column in range(24):
        assert not choose_column(code, column, torch.full((30,), 5.0))[~kept[:, column]].any()
    code.set_coefficients(torch.ones(len(code.features()), 30))
    assert not code.values()[~kept].any() and torch.equal(code.kept.T, kept)
    assert not code.features()[:, ~kept].any()


def test_a_cell_cut_off_by_the_edge_keeps_its_share() -> None:
    layout = quantize(random_weight(5, 19), keep=4, of=8, group_size=16)
    assert (kept_by(layout)[:, 16:].sum(1) == 2).all()
    assert (kept_by(quantize(random_weight(5, 3), keep=4, of=8)).sum(1) == 2).all()


@pytest.mark.parametrize("mask_size", [8, 16])
def test_masks_of_an_earlier_sweep(mask_size: int) -> None:
    weight = skewed_weight(12, 64)
    options: dict[str, Any] = {"max_salient": 0, "regions": 1, "mean": False, "feedback": "column"}
    masks = kept_by(quantize(weight, group_size=mask_size, **options))
    assert torch.equal(kept_by(quantize(weight, group_size=0, mask_size=mask_size, **options)), masks)
    assert not torch.equal(kept_by(quantize(weight, group_size=0, **options)), masks)


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(
    ("max_salient", "regions", "dtype"), [(0, 1, "float16"), (49, 3, "float16"), (5, 2, "bfloat16")]
)
def test_packing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, feedback: Feedback, mean: bool, max_salient: int, regions: int, dtype: str
) -> None:
    codes: list[StructuredCode] = []

    def recording(*arguments: Any) -> StructuredCode:
        codes.append(quantize_group(*arguments))
        return codes[-1]

    monkeypatch.setattr(stbllm, "quantize_group", recording)
    rounds = 0 if feedback == "none" else 1
    options: dict[str, Any] = {"feedback": feedback, "mean": mean, "max_salient": max_salient, "scale_dtype": dtype}
    layout = quantize(skewed_weight(5, 70), group_size=32, regions=regions, refits=rounds, passes=rounds, **options)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("regions", [1, 2, 3])
def test_reassigned_weights_get_the_nearest_value(mean: bool, regions: int) -> None:
    weight = skewed_weight(60, 24)
    options = StbllmOptions(mean=mean, regions=regions, max_salient=0 if regions == 1 else 5, column_search="weights")
    kept = torch.ones(60, 24, dtype=torch.bool)
    code = quantize_group(weight, kept, torch.ones(24), options)
    assert sum(code.salient) == (0 if regions == 1 else 5)
    # In one row of two the residual's scale is the larger one.
    code = dataclasses.replace(code, residual_scale=code.residual_scale * torch.tensor([9, 1]).repeat(30))
    means = torch.zeros_like(code.scales) if code.means is None else code.means
    for column in range(24):
        drifted = weight[:, column] + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(column))
        found = choose_column(code, column, drifted)
        if code.salient[column]:
            sums = [a * code.scales[-1].float() + b * code.residual_scale.float() for a in (1, -1) for b in (1, -1)]
            choices = torch.stack(sums) + means[-1].float()
        else:
            scales, centers = code.scales[:regions].float(), means[:regions].float()
            choices = torch.cat([centers + scales, centers - scales])
        assert torch.allclose((found - drifted).abs(), (choices - drifted).abs().amin(0), atol=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_values_are_linear_in_the_coefficients(mean: bool) -> None:
    """And coefficients come back as they were given, once rounded."""
    weight, kept = skewed_weight(9, 24), random_weight(9, 24) > 0
    code = quantize_group(weight, kept, torch.ones(24), StbllmOptions(mean=mean))
    features = code.features()
    coefficients = torch.rand(len(features), 9).half().float()
    code.set_coefficients(coefficients)
    assert torch.allclose(code.values(), (coefficients.unsqueeze(2) * features).sum(0), atol=1e-6)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1), (4, 24)])
def test_degenerate_matrices(shape: tuple[int, int], feedback: Feedback, regions: int) -> None:
    rounds = 0 if feedback == "none" else 1
    options: dict[str, Any] = {"feedback": feedback, "regions": regions, "refits": rounds, "passes": rounds}
    for weight in (torch.zeros(shape), torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape)):
        for size in (8, 0):
            for keep in (4, 8):
                layout = quantize(
                    weight.clone(), group_size=size, keep=keep, max_salient=49 * (regions > 1), mean=False, **options
                )
                found = layout.dequantize()
                assert found.isfinite().all()
                if not weight.any() or (keep == 8 and not rounds):
                    assert torch.equal(found, weight)


def test_always_zero_inputs() -> None:
    inputs = random_inputs(100, 40)
    inputs[:, :16] = 0  # the whole first group
    hessian, weight = hessian_of(inputs), skewed_weight(5, 40)
    layout = stbllm.quantize(weight, factorize(hessian, 0.01), StbllmOptions(group_size=16))
    assert not layout.dequantize()[:, :16].any()
    assert quadratic(layout.dequantize() - weight, hessian) < 0.5 * quadratic(weight, hessian)


def test_salient_columns_are_those_that_matter() -> None:
    weight, factor = random_weight(20, 32), random_factor(32)
    weight[:, [5, 9]] *= 10
    layout = stbllm.quantize(weight, factor, StbllmOptions(group_size=0, max_salient=2, column_search="weights"))
    assert unpack_bits(layout.get_buffer("salient"), 32).nonzero().flatten().tolist() == [5, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 9}, "more than all"),
        ({"group_size": 100}, "no multiple of 8"),
        ({"mask_size": 12}, "no multiple of 8"),
        ({"regions": 1}, "max_salient 0"),
        ({"of": 17}, "16"),
        ({"regions": 4}, "3"),
        ({"feedback": "none", "refits": 1}, "feedback"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SignbitError, match=message):
        Recipe({"method": "stbllm", **options})


def test_deterministic() -> None:
    weight = skewed_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_needs_a_hessian() -> None:
    with pytest.raises(ValueError, match="Hessian"):
        stbllm.quantize(random_weight(2, 8), None, StbllmOptions())


# --- presets ----------------------------------------------------------------------------------------------------------


def with_preset(name: str, weight: Tensor, factor: Factor) -> Structured:
    recipe = Recipe.load(name)
    assert isinstance(recipe.options, StbllmOptions)
    return stbllm.quantize(weight, factor, recipe.options)


def bits(layout: Structured) -> float:
    return 8 * sum(layout.items().values()) / (layout.shape[0] * layout.shape[1])


def test_plus_has_less_error_in_fewer_bits() -> None:
    hessian = hessian_of(random_inputs(800, 192))
    factor, weight = factorize(hessian, 0.01), skewed_weight(96, 192)
    paper, plus = (with_preset(name, weight, factor) for name in ("stbllm", "stbllm-plus"))
    assert bits(plus) < 0.8 * bits(paper)
    errors = [quadratic(layout.dequantize() - weight, hessian) for layout in (paper, plus)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", ["stbllm-2-8", "stbllm-1-4"])
@pytest.mark.parametrize("width", [576, 1536])
def test_presets_below_one_bit_are(name: str, width: int) -> None:
    factor = factorize(torch.rand(width, generator=torch.Generator().manual_seed(0)).add(0.1).diag(), 0.01)
    assert bits(with_preset(name, random_weight(16, width), factor)) < 0.98


# --- N block by block, in a whole run ---------------------------------------------------------------------------------


def run_recipe(text: Path, **keys: Any) -> Recipe:
    return Recipe({**SMALL_RECIPE, "calib": str(text), "method": "stbllm", **keys})


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def kept_by_block(checkpoint: Path) -> list[set[int]]:
    blocks: dict[str, set[int]] = {}
    for layer in signbit.inspect(checkpoint)["layers"]:
        assert layer["of"] == 8
        blocks.setdefault(layer["name"].split(".")[2], set()).add(layer["keep"])
    return [blocks[index] for index in sorted(blocks)]


@pytest.mark.parametrize("allocation", ["norm", "outlier"])
def test_each_block_keeps_its_own_number(allocation: str, tiny_dir: Any, text_file: Path, tmp_path: Path) -> None:
    """As the file says; the same bytes after an interruption as without."""
    model, recipe = str(tiny_dir("gemma3")), run_recipe(text_file, allocation=allocation)
    signbit.quantize(model, tmp_path / "whole", recipe, device="cpu")
    found = signbit.inspect(tmp_path / "whole")
    assert found["nominal_bits_per_weight"] < found["bits_per_weight"]
    assert found["bytes"]["quantized"] == sum(found["items"].values())
    kept = kept_by_block(tmp_path / "whole")
    assert all(len(block) == 1 for block in kept)
    counts = [min(block) for block in kept]
    assert sum(counts) == 4 * len(counts) and len(set(counts)) > 1

    class StoppedError(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        write_block = signbit.journal.Journal.write_block

        def stop(self: Any, index: int, block: Any) -> None:
            write_block(self, index, block)
            raise StoppedError

        patch.setattr(signbit.journal.Journal, "write_block", stop)
        with pytest.raises(StoppedError):
            signbit.quantize(model, tmp_path / "out", recipe, device="cpu")
    kept_options = tmp_path / "out.partial" / "options.json"
    good = kept_options.read_text()
    for damaged in ("{", "[]", "{}", good.replace('"keep": ', '"keep": 9'), good.replace('"keep"', '"nope"'), "7"):
        kept_options.write_text(damaged)
        with pytest.raises(SignbitError, match=r"options\.json is damaged"):
            signbit.quantize(model, tmp_path / "out", recipe, device="cpu", resume=True)
    kept_options.write_text(good)
    signbit.quantize(model, tmp_path / "out", recipe, device="cpu", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_looking_at_the_original_model_changes_nothing_else(
    family: str, tiny_dir: Any, text_file: Path, tmp_path: Path
) -> None:
    """With all to keep anyway there is nothing to allocate: the same file with and without the extra pass."""
    for allocation in ("uniform", "outlier"):
        recipe = run_recipe(text_file, allocation=allocation, keep=8)
        signbit.quantize(str(tiny_dir(family)), tmp_path / allocation, recipe, device="cpu")
    weights = [contents(tmp_path / allocation)["model.safetensors"] for allocation in ("uniform", "outlier")]
    assert weights[0] == weights[1]
