from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import SplitPlanes, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from stored import check_made_again


def random_parts(
    n: int,
    m: int,
    group_size: int,
    salient: str,
    mean: bool,
    dtype: str,
    bitmap: bool = False,
    columns: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of encode. salient: which columns are: none, all, some, or some in every second group only."""
    generator = torch.Generator().manual_seed(seed)
    size = group_size or m
    groups = -(-m // size)
    chosen = {"none": torch.zeros(m), "all": torch.ones(m)}.get(salient, torch.rand(m, generator=generator)) > 0.7
    if salient == "gaps":
        chosen &= torch.arange(m) // size % 2 == 1
    with_salient = len({j // size for j in range(m) if chosen[j]})
    count, zones = int(chosen.sum()), (2,) if bitmap else ()

    def coefficients(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(SCALE_DTYPES[dtype])

    return {
        "negative": torch.rand(n, m, generator=generator) < 0.5,
        "second": torch.rand(n, m, generator=generator) < 0.5,
        "salient": chosen,
        "scales": coefficients(n, groups, 2).abs(),
        "means": coefficients(n, groups, 2) if mean else None,
        "salient_scales": coefficients(n, with_salient, *zones, 2).abs(),
        "salient_means": coefficients(n, with_salient, *zones) if mean else None,
        "group_size": group_size,
        "residual": torch.rand(n, count, generator=generator) < 0.5 if bitmap else None,
        "column_scales": coefficients(2, m) if columns else None,
        "salient_column_scales": coefficients(*zones, 2, count) if columns else None,
    }


def slow(
    negative: Tensor,
    second: Tensor,
    salient: Tensor,
    scales: Tensor,
    means: Tensor | None,
    salient_scales: Tensor,
    salient_means: Tensor | None,
    group_size: int,
    residual: Tensor | None,
    column_scales: Tensor | None,
    salient_column_scales: Tensor | None,
) -> Tensor:
    """Weight by weight, each sum and product rounded to float32."""
    n, m = negative.shape
    size = group_size or m
    places: dict[int, int] = {}  # group -> its place among the groups with salient columns
    numbers: dict[int, int] = {}  # salient column -> its place among them
    for j in range(m):
        if salient[j]:
            places.setdefault(j // size, len(places))
            numbers[j] = len(numbers)

    def at(coefficients: Tensor | None, *index: int) -> Any:
        return None if coefficients is None else np.float32(coefficients[index].item())

    def product(row: Any, column: Any) -> Any:
        return row if column is None else row * column

    values = np.zeros((n, m), np.float32)
    for i in range(n):
        for j in range(m):
            group, other = j // size, int(second[i, j])
            sign = np.float32(-1 if negative[i, j] else 1)
            if salient[j]:
                place, number = places[group], numbers[j]
                zone = (other,) if residual is not None else ()
                rest = int(residual[i, number]) if residual is not None else other
                alpha, rho = (
                    product(at(salient_scales, i, place, *zone, o), at(salient_column_scales, *zone, o, number))
                    for o in (0, 1)
                )
                value = alpha * sign + rho * np.float32(1 - 2 * rest)
                mean = at(salient_means, i, place, *zone)
            else:
                value = product(at(scales, i, group, other), at(column_scales, other, j)) * sign
                mean = at(means, i, group, other)
            values[i, j] = value if mean is None else value + mean
    return torch.from_numpy(values)


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 4),
        "m": st.integers(1, 100),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 64, 128]),
        "salient": st.sampled_from(["none", "all", "some", "gaps"]),
        "mean": st.booleans(),
        "bitmap": st.booleans(),
        "columns": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(shapes)
@settings(deadline=None, max_examples=150)
def test_dequantized_is_the_slow_sum_to_the_bit(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = SplitPlanes.encode(**parts)
    whole = layout.dequantize()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, slow(**parts))
    for rows in (slice(0, 1), slice(-2, None), slice(0, None, 2)):
        assert torch.equal(layout.dequantize(rows), whole[rows])


def test_no_rows() -> None:
    layout = SplitPlanes.encode(**random_parts(3, 40, 16, "some", True, "float16"))
    assert layout.dequantize(slice(3, None)).shape == (0, 40)


@given(shapes)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    layout = SplitPlanes.encode(**random_parts(**shape))
    check_made_again(layout)


@pytest.mark.parametrize("mean", [False, True])
def test_items(mean: bool) -> None:
    parts = random_parts(3, 100, 32, "none", mean, "float16")
    parts["salient"][[3, 4, 40]] = True  # in 2 of 4 groups
    parts["salient_scales"] = torch.ones(3, 2, 2, dtype=torch.float16)
    parts["salient_means"] = torch.ones(3, 2, dtype=torch.float16) if mean else None
    layout = SplitPlanes.encode(**parts)
    scales, means = 2 * 3 * (4 * 2 + 2 * 2), 2 * 3 * (4 * 2 + 2)
    assert layout.items() == {"signs": 48, "masks": 48, "columns": 16, "scales": scales} | (
        {"means": means} if mean else {}
    )
    assert layout.nominal_bits == pytest.approx(1.03)


def test_items_of_zones_and_columns() -> None:
    layout = SplitPlanes.encode(**random_parts(3, 100, 32, "all", True, "float16", bitmap=True, columns=True))
    assert layout.items() == {
        "signs": 48 + 48,  # with a residual sign of every weight
        "masks": 48,
        "columns": 16,
        "scales": 2 * (3 * 4 * 2 + 3 * 4 * 4 + 100 * 2 + 100 * 4),
        "means": 2 * (3 * 4 * 2 + 3 * 4 * 2),
    }
    assert layout.nominal_bits == 2


@pytest.mark.parametrize("salient", ["none", "some"])
def test_no_map_takes_less_than_its_entropy(salient: str) -> None:
    """Maps are stored plainly, one bit a weight or column, which no distribution of them can exceed."""
    items = SplitPlanes.encode(**random_parts(16, 96, 32, salient, False, "float16", bitmap=True)).items()
    assert items["masks"] * 8 >= 16 * 96
    assert items["columns"] * 8 >= 96


@pytest.mark.parametrize("change", ["half", "bfloat16"])
def test_a_models_dtype_does_not_reach_the_stored_tensors(change: str) -> None:
    layout = SplitPlanes.encode(**random_parts(3, 40, 16, "some", True, "float16" if change != "half" else "bfloat16"))
    before = {name: tensor.clone() for name, tensor in layout.state_dict().items()}
    getattr(layout, change)()
    for name, tensor in layout.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "name", ["scales", "means", "salient_scales", "salient_means", "column_scales", "salient_column_scales"]
)
def test_coefficients_beyond_their_dtype_are_refused_with_the_way_out(name: str) -> None:
    parts = random_parts(2, 40, 16, "all", True, "float16", bitmap=True, columns=True)
    parts[name] = torch.full(parts[name].shape, 70_000.0).to(torch.float16)
    with pytest.raises(SignbitError, match=rf"^{name} .*scale_dtype=bfloat16"):
        SplitPlanes.encode(**parts)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 0.5]},
        {"group_size": -1},
        {"group_size": 2**70},
        {"salient_groups": -1},
        {"salient_groups": 0.0},
        {"salient_columns": 41},
        {"mean": None},
        {"mean": "x"},
        {"bias": 2},
        {"surprise": 0},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(SplitPlanes.encode(**random_parts(2, 40, 16, "some", True, "float16")))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("model.layers.0.q_proj", {**good, **change})


def test_a_description_from_before_zones_and_columns_has_none() -> None:
    good = describe(SplitPlanes.encode(**random_parts(2, 40, 16, "some", True, "float16")))
    before = {key: value for key, value in good.items() if key not in ("bitmap", "column_scales")}
    assert parse_spec("q_proj", before) == parse_spec("q_proj", good)


@pytest.mark.parametrize("bitmap", [False, True])
def test_a_column_map_that_contradicts_the_description_is_refused(bitmap: bool) -> None:
    layout = SplitPlanes.encode(**random_parts(2, 40, 16, "some", True, "float16", bitmap))
    layout.check("q_proj")
    layout.salient[0] ^= 1
    with pytest.raises(SignbitError, match=r"q_proj\.salient marks"):
        layout.check("q_proj")
