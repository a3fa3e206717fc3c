from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import LAYOUTS, SignPlanes, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from stored import check_made_again


def random_parts(
    planes: int, n: int, m: int, group_size: int, mean: bool, dtype: str, columns: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Arguments of encode."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == 0 else -(-m // group_size)
    return {
        "negative": torch.rand(planes, n, m, generator=generator) < 0.5,
        "scales": torch.rand(planes, n, groups, generator=generator).to(SCALE_DTYPES[dtype]),
        "means": torch.randn(n, groups, generator=generator).to(SCALE_DTYPES[dtype]) if mean else None,
        "group_size": group_size,
        "column_scales": torch.randn(m, generator=generator).to(SCALE_DTYPES[dtype]) if columns else None,
    }


def slow(
    negative: Tensor, scales: Tensor, means: Tensor | None, group_size: int, column_scales: Tensor | None
) -> Tensor:
    """Weight by weight, plane after plane, each sum and product rounded to float32."""
    planes, n, m = negative.shape
    values = np.zeros((n, m), np.float32)
    for i in range(n):
        for j in range(m):
            group = j // group_size if group_size else 0
            value = np.float32(0)
            for plane in range(planes):
                scale = np.float32(scales[plane, i, group].item())
                value = value + (-scale if negative[plane, i, j] else scale)
            value = value if means is None else value + np.float32(means[i, group].item())
            values[i, j] = value if column_scales is None else value * np.float32(column_scales[j].item())
    return torch.from_numpy(values)


shapes = st.fixed_dictionaries(
    {
        "planes": st.integers(1, 4),
        "n": st.integers(1, 4),
        "m": st.integers(1, 70),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 64, 128]),
        "mean": st.booleans(),
        "columns": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_dequantized_is_the_slow_sum_to_the_bit(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = SignPlanes.encode(**parts)
    whole = layout.dequantize()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, slow(**parts))
    for rows in (slice(0, 1), slice(-2, None), slice(0, None, 2)):
        assert torch.equal(layout.dequantize(rows), whole[rows])


def test_no_rows() -> None:
    layout = SignPlanes.encode(**random_parts(2, 3, 40, 16, True, "float16"))
    assert layout.dequantize(slice(3, None)).shape == (0, 40)


@given(shapes)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    layout = SignPlanes.encode(**random_parts(**shape))
    check_made_again(layout)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_items(mean: bool, columns: bool) -> None:
    layout = SignPlanes.encode(**random_parts(2, 3, 100, 64, mean, "float16", columns))
    # 2 planes of 3 rows of 4 words; 2 planes x 3 rows x 2 groups of 2 bytes
    assert layout.items() == {"signs": 96, "scales": 24 + 200 * columns} | ({"means": 12} if mean else {})
    assert layout.nominal_bits == 2


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_a_models_dtype_does_not_reach_the_stored_tensors(change: str) -> None:
    layout = SignPlanes.encode(**random_parts(1, 3, 40, 16, True, "float16" if change != "half" else "bfloat16"))
    before = {name: tensor.clone() for name, tensor in layout.state_dict().items()}
    torch.nn.ModuleDict({"inner": getattr(layout, change)()}).to(getattr(torch, change))
    for name, tensor in layout.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["scales", "means"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_coefficients_beyond_their_dtype_are_refused_with_the_way_out(name: str, value: float) -> None:
    parts = random_parts(1, 2, 40, 16, True, "float16")
    parts[name].flatten()[-1] = value
    with pytest.raises(SignbitError, match=rf"{name} .*scale_dtype=bfloat16"):
        SignPlanes.encode(**parts)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("signs", torch.zeros(1, 2, 4, dtype=torch.uint8)), ("scales", torch.zeros(1, 2, 3, dtype=torch.float32))],
)
def test_a_tensor_that_does_not_fit_the_spec_is_refused_by_name(name: str, tensor: Tensor) -> None:
    layout = SignPlanes.encode(**random_parts(1, 2, 40, 16, False, "float16"))
    with pytest.raises(ValueError, match=f"sign_planes.{name}: expected"):
        SignPlanes(layout.spec, {**dict(layout.state_dict()), name: tensor})


def test_allocates_nothing_on_meta() -> None:
    layout = SignPlanes.encode(**random_parts(1, 2, 40, 16, True, "bfloat16"))
    empty = SignPlanes(layout.spec, device="meta")
    assert empty.device.type == "meta"
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in layout.state_dict().items()
    }


GOOD = describe(SignPlanes.encode(**random_parts(1, 2, 40, 16, True, "float16")))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2]},
        {"shape": ["a", "b"]},
        {"shape": [2, -40]},
        {"shape": None},
        {"group_size": "x"},
        {"group_size": -16},
        {"planes": -1},
        {"scale_dtype": "float8"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("model.layers.0.q_proj", {**GOOD, **change})


@pytest.mark.parametrize("kind", ["sign_plans", None, ["sign_planes"]])
def test_an_unknown_layout_is_refused_with_the_known_ones(kind: Any) -> None:
    with pytest.raises(SignbitError, match="q_proj: unknown layout") as caught:
        parse_spec("q_proj", {**GOOD, "layout": kind})
    assert all(known in str(caught.value) for known in LAYOUTS)


def test_a_description_from_before_column_scales_has_none() -> None:
    description = {key: value for key, value in GOOD.items() if key != "column_scales"}
    assert parse_spec("q_proj", description) == parse_spec("q_proj", GOOD)


def test_a_description_without_a_field_is_refused() -> None:
    for field in GOOD.keys() - {"layout", "column_scales"}:
        with pytest.raises(SignbitError, match="damaged layout description"):
            parse_spec("q_proj", {key: value for key, value in GOOD.items() if key != field})
