import json
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


def random_parts(
    n: int, m: int, group_size: int, salient: str, mean: bool, dtype: str, seed: int = 0
) -> dict[str, Any]:
    """Arguments of encode. salient: which columns are: none, all, some, or some in every second group only."""
    generator = torch.Generator().manual_seed(seed)
    size = group_size or m
    groups = -(-m // size)
    chosen = {"none": torch.zeros(m), "all": torch.ones(m)}.get(salient, torch.rand(m, generator=generator)) > 0.7
    if salient == "gaps":
        chosen &= torch.arange(m) // size % 2 == 1
    with_salient = len({j // size for j in range(m) if chosen[j]})

    def coefficients(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(SCALE_DTYPES[dtype])

    return {
        "negative": torch.rand(n, m, generator=generator) < 0.5,
        "second": torch.rand(n, m, generator=generator) < 0.5,
        "salient": chosen,
        "scales": coefficients(n, groups, 2).abs(),
        "means": coefficients(n, groups, 2) if mean else None,
        "salient_scales": coefficients(n, with_salient, 2).abs(),
        "salient_means": coefficients(n, with_salient) if mean else None,
        "group_size": group_size,
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
) -> Tensor:
    """Weight by weight, each sum rounded to float32."""
    n, m = negative.shape
    size = group_size or m
    places: dict[int, int] = {}  # group -> its place among the groups with salient columns
    for j in range(m):
        if salient[j]:
            places.setdefault(j // size, len(places))
    values = np.zeros((n, m), np.float32)
    for i in range(n):
        for j in range(m):
            group, other = j // size, int(second[i, j])
            sign = np.float32(-1 if negative[i, j] else 1)
            if salient[j]:
                alpha, rho = (np.float32(scale) for scale in salient_scales[i, places[group]].tolist())
                value = alpha * sign + rho * np.float32(1 - 2 * other)
                mean = None if salient_means is None else salient_means[i, places[group]]
            else:
                value = np.float32(scales[i, group, other].item()) * sign
                mean = None if means is None else means[i, group, other]
            values[i, j] = value if mean is None else value + np.float32(mean.item())
    return torch.from_numpy(values)


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 4),
        "m": st.integers(1, 100),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 64, 128]),
        "salient": st.sampled_from(["none", "all", "some", "gaps"]),
        "mean": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(shapes)
@settings(deadline=None, max_examples=80)
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
    kind, spec = parse_spec("m", json.loads(json.dumps(describe(layout))))
    assert (kind, spec) == (SplitPlanes, layout.spec)
    stored = layout.state_dict()
    assert list(stored) == list(spec.tensors())
    assert torch.equal(kind(spec, dict(stored)).dequantize(), layout.dequantize())
    assert sum(layout.items().values()) == sum(tensor.nbytes for tensor in stored.values())


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


@pytest.mark.parametrize("change", ["half", "bfloat16"])
def test_a_models_dtype_does_not_reach_the_stored_tensors(change: str) -> None:
    layout = SplitPlanes.encode(**random_parts(3, 40, 16, "some", True, "float16" if change != "half" else "bfloat16"))
    before = {name: tensor.clone() for name, tensor in layout.state_dict().items()}
    getattr(layout, change)()
    for name, tensor in layout.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["scales", "means", "salient_scales", "salient_means"])
def test_coefficients_beyond_their_dtype_are_refused_with_the_way_out(name: str) -> None:
    parts = random_parts(2, 40, 16, "all", True, "float16")
    parts[name] = torch.full(parts[name].shape, 70_000.0).to(torch.float16)
    with pytest.raises(SignbitError, match=rf"^{name} .*scale_dtype=bfloat16"):
        SplitPlanes.encode(**parts)


@pytest.mark.parametrize(
    "change", [{"shape": [2, 0.5]}, {"group_size": -1}, {"salient_groups": -1}, {"mean": None, "surprise": 0}], ids=str
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(SplitPlanes.encode(**random_parts(2, 40, 16, "some", True, "float16")))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("model.layers.0.q_proj", {**good, **change})
