import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import HaarPlanes, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from signbit.layouts.bits import pack_bits
from signbit.layouts.haar_planes import SalientPart
from stored import check_made_again


def random_parts(
    axis: str, n: int, m: int, group_size: int, salient: str, means: int, dtype: str, share: float = 0.5, seed: int = 0
) -> dict[str, Any]:
    """Arguments of encode. salient: which columns are: none, all, some, or some in every second group only; share: of
    the coefficients that are sparse."""
    generator = torch.Generator().manual_seed(seed)
    size = group_size or m
    groups, bands = -(-m // size), 2 if axis == "row" else 1
    chosen = {"none": torch.zeros(m), "all": torch.ones(m)}.get(salient, torch.rand(m, generator=generator)) > 0.7
    if salient == "gaps":
        chosen &= torch.arange(m) // size % 2 == 1
    count, marked = int(chosen.sum()), len({j // size for j in range(m) if chosen[j]})

    def coefficients(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(SCALE_DTYPES[dtype])

    def plane(columns: int, share: float = 0.5) -> Tensor:
        return torch.rand(n, columns, generator=generator) < share

    part = SalientPart(
        columns=chosen,
        scales=coefficients(n, marked, 2).abs(),
        means=coefficients(n, marked, 2) if means else None,
        negative=plane(count) if axis == "row" else None,
        second=plane(count) if axis == "row" else None,
    )
    return {
        "axis": axis,
        "negative": plane(m),
        "second": plane(m, share),
        "scales": coefficients(n, groups, bands, 2).abs(),
        "means": coefficients(n, groups, bands, means) if means else None,
        "salient": part if count else None,
        "group_size": group_size,
    }


ROOT_HALF = np.float32(0.5**0.5)


def slow_haar(x: np.ndarray) -> np.ndarray:
    """Of a vector, each sum and product rounded to float32."""
    x = x.copy()
    for j in range(0, len(x) - 1, 2):
        a, b = x[j], x[j + 1]
        x[j], x[j + 1] = (a + b) * ROOT_HALF, (a - b) * ROOT_HALF
    return x


def slow(
    axis: str,
    negative: Tensor,
    second: Tensor,
    scales: Tensor,
    means: Tensor | None,
    salient: SalientPart | None,
    group_size: int,
) -> Tensor:
    """Coefficient by coefficient, as docs/format.md tells it."""
    n, m = negative.shape
    size = group_size or m

    def coefficient(minus: Tensor, q: Tensor, scale: Tensor, mean: Tensor | None) -> np.float32:
        value = np.float32(-1 if minus else 1) * np.float32(scale[int(q)].item())
        return value if mean is None else value + np.float32(mean[int(q) % len(mean)].item())

    marked = [j for j in range(m) if salient is not None and salient.columns[j]]
    groups = sorted({j // size for j in marked})
    values = np.zeros((n, m), np.float32)
    beside = np.zeros((n, len(marked)), np.float32)
    for i in range(n):
        for j in range(m):
            book, band = (i, j // size), (j % size) % 2 if axis == "row" else 0
            mean = None if means is None else means[book][band]
            values[i, j] = coefficient(negative[i, j], second[i, j], scales[book][band], mean)
        for c, j in enumerate(marked):
            assert salient is not None
            place = (i, groups.index(j // size))
            mean = None if salient.means is None else salient.means[place]
            if salient.negative is None or salient.second is None:
                values[i, j] = coefficient(negative[i, j], second[i, j], salient.scales[place], mean)
            else:
                beside[i, c] = coefficient(salient.negative[i, c], salient.second[i, c], salient.scales[place], mean)
    if axis == "column":
        return torch.from_numpy(np.stack([slow_haar(column) for column in values.T], axis=1))
    for i in range(n):
        for start in range(0, m, size):
            values[i, start : start + size] = slow_haar(values[i, start : start + size])
    for c, j in enumerate(marked):
        values[:, j] += slow_haar(beside[:, c])
    return torch.from_numpy(values)


shapes = st.fixed_dictionaries(
    {
        "axis": st.sampled_from(["row", "column"]),
        "n": st.integers(1, 5),
        "m": st.integers(1, 80),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 64, 128]),
        "salient": st.sampled_from(["none", "all", "some", "gaps"]),
        "means": st.integers(0, 2),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_dequantized_is_the_slow_sum_to_the_bit(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = HaarPlanes.encode(**parts)
    whole = layout.dequantize()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, slow(**parts))
    for rows in (slice(0, 1), slice(1, 2), slice(1, 4), slice(-2, None), slice(1, None, 2), slice(9, 12)):
        assert torch.equal(layout.dequantize(rows), whole[rows])


@given(shapes)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    layout = HaarPlanes.encode(**random_parts(**shape))
    check_made_again(layout)


@pytest.mark.parametrize("means", [0, 1, 2])
def test_items(means: int) -> None:
    row = HaarPlanes.encode(**random_parts("row", 3, 100, 32, "all", means, "float16"))
    column = HaarPlanes.encode(**random_parts("column", 3, 100, 32, "all", means, "float16"))
    planes = {"signs": 48, "masks": 48, "columns": 16}
    row_means, column_means = ({"means": 2 * 3 * 4 * (bands * means + 2)} if means else {} for bands in (2, 1))
    assert row.items() == {key: 2 * count for key, count in planes.items() if key != "columns"} | {
        "columns": 16,
        "scales": 2 * 3 * 4 * (2 * 2 + 2),
        **row_means,
    }
    assert column.items() == planes | {"scales": 2 * 3 * 4 * (2 + 2), **column_means}
    assert (row.nominal_bits, column.nominal_bits) == (2.0, 1.0)


def test_without_salient_columns_nothing_is_stored_of_them() -> None:
    layout = HaarPlanes.encode(**random_parts("row", 3, 100, 32, "none", 0, "float16"))
    assert set(layout.state_dict()) == {"signs", "second", "scales"}


@given(st.floats(0, 1), st.integers(1, 100))
@settings(deadline=None, max_examples=20)
def test_no_map_is_stored_in_less_than_its_entropy(share: float, m: int) -> None:
    layout = HaarPlanes.encode(**random_parts("row", 4, m, 32, "some", 1, "float16", share))
    items = layout.items()

    def entropy(p: float, count: int) -> float:
        return -count * sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)

    stored = layout.spec.salient_columns
    assert 8 * items["masks"] >= entropy(share, 4 * m) + entropy(0.5, 4 * stored)
    assert 8 * items.get("columns", 0) >= entropy(stored / m, m)


@pytest.mark.parametrize("name", ["scales", "means", "salient_scales", "salient_means"])
def test_coefficients_beyond_their_dtype_are_refused_with_the_way_out(name: str) -> None:
    layout = HaarPlanes.encode(**random_parts("row", 2, 40, 16, "all", 1, "float16"))
    tensors = dict(layout.state_dict())
    tensors[name] = torch.full_like(tensors[name], torch.inf)
    with pytest.raises(SignbitError, match=rf"^{name} .*scale_dtype=bfloat16"):
        HaarPlanes(layout.spec, tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"axis": "diagonal"},
        {"shape": [2, 0.5]},
        {"group_size": -1},
        {"means": 3},
        {"means": True},
        {"salient_columns": 41},
        {"salient_groups": 9},
        {"salient_groups": -1},
        {"surprise": 0},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(HaarPlanes.encode(**random_parts("row", 2, 40, 16, "some", 1, "float16")))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("m", {**good, **change})


def test_a_map_that_contradicts_the_description_is_refused() -> None:
    layout = HaarPlanes.encode(**random_parts("column", 2, 40, 16, "some", 1, "float16"))
    layout.check("m")
    tensors = dict(layout.state_dict()) | {"salient": pack_bits(torch.arange(40) == 3)}
    with pytest.raises(SignbitError, match=r"m.salient marks 1 columns in 1 groups"):
        HaarPlanes(layout.spec, tensors).check("m")
