import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import Structured, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from signbit.layouts.structured import kept_in_part
from stored import check_made_again


def random_kept(n: int, m: int, keep: int, of: int, generator: torch.Generator) -> Tensor:
    cells = []
    for start in range(0, m, of):
        width = min(of, m - start)
        cells.append(torch.rand(n, width, generator=generator).argsort(1) < kept_in_part(width, keep, of))
    return torch.cat(cells, dim=1)


def random_parts(
    n: int, m: int, keep: int, of: int, cells: int, regions: int, salient: str, mean: bool, dtype: str, seed: int = 0
) -> dict[str, Any]:
    """Arguments of encode. cells: in a group, 0 for the whole row; salient: none, all, some, or some in every second
    group."""
    generator = torch.Generator().manual_seed(seed)
    group_size = cells * of
    size = group_size or m
    groups = -(-m // size)
    chosen = {"none": torch.zeros(m), "all": torch.ones(m)}.get(salient, torch.rand(m, generator=generator)) > 0.7
    if salient == "gaps":
        chosen &= torch.arange(m) // size % 2 == 1
    chosen &= torch.tensor(regions > 1)
    with_salient = len({j // size for j in range(m) if chosen[j]})

    def coefficients(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(SCALE_DTYPES[dtype])

    region = torch.randint(regions, (n, m), generator=generator, dtype=torch.uint8)
    return {
        "kept": random_kept(n, m, keep, of, generator),
        "keep": keep,
        "of": of,
        "negative": torch.rand(n, m, generator=generator) < 0.5,
        "region": torch.where(chosen, region.clamp(max=1), region),
        "salient": chosen,
        "scales": coefficients(n, groups, regions).abs(),
        "means": coefficients(n, groups, regions) if mean else None,
        "salient_scales": coefficients(n, with_salient, 2).abs(),
        "salient_means": coefficients(n, with_salient) if mean else None,
        "group_size": group_size,
    }


def slow(
    kept: Tensor,
    keep: int,
    of: int,
    negative: Tensor,
    region: Tensor,
    salient: Tensor,
    scales: Tensor,
    means: Tensor | None,
    salient_scales: Tensor,
    salient_means: Tensor | None,
    group_size: int,
) -> Tensor:
    """Weight by weight, each sum rounded to float32."""
    n, m = kept.shape
    size = group_size or m
    places: dict[int, int] = {}  # group -> its place among the groups with salient columns
    for j in range(m):
        if salient[j]:
            places.setdefault(j // size, len(places))
    values = np.zeros((n, m), np.float32)
    for i in range(n):
        for j in range(m):
            if not kept[i, j]:
                continue
            group, part = j // size, int(region[i, j])
            sign = np.float32(-1 if negative[i, j] else 1)
            if salient[j]:
                alpha, rho = (np.float32(scale) for scale in salient_scales[i, places[group]].tolist())
                value = alpha * sign + rho * np.float32(1 - 2 * part)
                mean = None if salient_means is None else salient_means[i, places[group]]
            else:
                value = np.float32(scales[i, group, part].item()) * sign
                mean = None if means is None else means[i, group, part]
            values[i, j] = value if mean is None else value + np.float32(mean.item())
    return torch.from_numpy(values)


CHOICES = [(4, 8), (5, 8), (6, 8), (2, 8), (1, 4), (2, 4), (3, 7), (8, 8), (1, 1), (5, 16), (2, 3)]
shapes = st.tuples(
    st.sampled_from(CHOICES),
    st.fixed_dictionaries(
        {
            "n": st.integers(1, 5),
            "m": st.integers(1, 70),
            "cells": st.integers(0, 5),
            "regions": st.integers(1, 3),
            "salient": st.sampled_from(["none", "all", "some", "gaps"]),
            "mean": st.booleans(),
            "dtype": st.sampled_from(["float16", "bfloat16"]),
            "seed": st.integers(0, 99),
        }
    ),
).map(lambda drawn: {"keep": drawn[0][0], "of": drawn[0][1], **drawn[1]})


@given(shapes)
@settings(deadline=None, max_examples=120)
def test_dequantized_is_the_slow_sum_to_the_bit(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = Structured.encode(**parts)
    layout.check("m")
    whole = layout.dequantize()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, slow(**parts))
    for rows in (slice(0, 1), slice(-2, None), slice(0, None, 2)):
        assert torch.equal(layout.dequantize(rows), whole[rows])


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    layout = Structured.encode(**random_parts(**shape))
    check_made_again(layout)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_no_map_takes_less_than_it_says(shape: dict[str, Any]) -> None:
    """The entropy of what the maps hold, with their own frequencies, is what no code of theirs can go below."""
    parts = random_parts(**shape)
    layout = Structured.encode(**parts)
    kept, columns = parts["kept"], shape["m"] // shape["of"] * shape["of"]
    region = torch.where(parts["salient"], parts["region"].clamp(max=1), parts["region"])[kept]
    words = kept[:, :columns].reshape(-1, shape["of"]) * 2 ** torch.arange(shape["of"])
    bits = entropy(words.sum(1)) + (entropy(region) if layout.spec.regions > 1 else 0)
    assert 8 * layout.items()["masks"] >= bits - 1e-6
    assert 8 * layout.items()["signs"] >= int(kept.sum())


def entropy(symbols: Tensor) -> float:
    counts = symbols.unique(return_counts=True)[1].double()
    return float((counts * (counts.sum() / counts).log2()).sum()) if len(counts) else 0.0


def test_no_rows() -> None:
    layout = Structured.encode(**random_parts(3, 40, 4, 8, 2, 3, "some", True, "float16"))
    assert layout.dequantize(slice(3, None)).shape == (0, 40)


def test_items() -> None:
    """4 of 8 in 64 columns: 32 signs, 8 ranks of 7 bits, 32 trits."""
    parts = random_parts(3, 64, 4, 8, 4, 3, "none", True, "float16")
    assert Structured.encode(**parts).items() == {
        "signs": 3 * 4,
        "masks": 3 * 8 + 3 * 8,
        "scales": 3 * 2 * 3 * 2,
        "means": 3 * 2 * 3 * 2,
    }
    parts["salient"][[3, 40]] = True
    parts["salient_scales"], parts["salient_means"] = torch.ones(3, 2, 2).half(), torch.ones(3, 2).half()
    layout = Structured.encode(**parts)
    assert layout.items()["columns"] == 8
    assert layout.items()["scales"] == 36 + 24 and layout.items()["means"] == 36 + 12
    assert layout.nominal_bits == pytest.approx(0.5 * (1 + 2 / 64))


@pytest.mark.parametrize(("keep", "of", "most"), [(2, 8, 0.98), (1, 4, 0.81)])
@pytest.mark.parametrize("width", [576, 1536])
def test_below_one_bit(keep: int, of: int, most: float, width: int) -> None:
    layout = Structured.encode(**random_parts(4, width, keep, of, 0, 1, "none", False, "float16"))
    assert 8 * sum(layout.items().values()) / (4 * width) < most


def test_a_matrix_that_keeps_another_number_is_refused() -> None:
    parts = random_parts(2, 16, 4, 8, 0, 2, "none", False, "float16")
    parts["kept"][0, :8] = True
    with pytest.raises(ValueError, match="4 of 8"):
        Structured.encode(**parts)


@pytest.mark.parametrize(("columns", "kept"), [(0, 0), (1, 1), (3, 2), (7, 4), (8, 4)])
def test_part_of_a_cell(columns: int, kept: int) -> None:
    assert kept_in_part(columns, 4, 8) == kept == math.ceil(columns / 2)


@pytest.mark.parametrize("name", ["scales", "means", "salient_scales", "salient_means"])
def test_coefficients_beyond_their_dtype_are_refused_with_the_way_out(name: str) -> None:
    parts = random_parts(2, 40, 4, 8, 2, 2, "all", True, "float16")
    parts[name] = torch.full(parts[name].shape, 70_000.0).to(torch.float16)
    with pytest.raises(SignbitError, match=rf"^{name} .*scale_dtype=bfloat16"):
        Structured.encode(**parts)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 0.5]},
        {"keep": 0},
        {"keep": 9},
        {"of": 17},
        {"of": True},
        {"group_size": -8},
        {"group_size": 12},
        {"regions": 4},
        {"regions": 1},
        {"salient_columns": 0},
        {"salient_groups": 99},
        {"scale_dtype": "int8"},
        {"mean": None, "surprise": 0},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(Structured.encode(**random_parts(2, 40, 4, 8, 2, 2, "all", True, "float16")))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("model.layers.0.q_proj", {**good, **change})


@pytest.mark.parametrize("name", ["ranks", "regions", "salient"])
def test_damaged_tensors_are_refused_by_name(name: str) -> None:
    layout = Structured.encode(**random_parts(2, 40, 4, 8, 2, 3, "some", True, "float16"))
    layout.check("q_proj")
    layout.get_buffer(name).fill_(255)
    with pytest.raises(SignbitError, match=rf"^q_proj\.{name} "):
        layout.check("q_proj")
