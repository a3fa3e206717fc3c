import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import IntegerRows, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES


def random_rows(n: int, m: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator) * 10 ** (2 * torch.rand(n, 1, generator=generator) - 1)


def slow(layout: IntegerRows) -> Tensor:
    """Read the codes one by one, as the format says."""
    n, m = layout.shape
    values = torch.zeros(n, m)
    for i in range(n):
        for j in range(m):
            if layout.spec.bits == 8:
                code = int(layout.codes[i, j])
            else:
                nibble = int(layout.codes[i, j // 2]) >> (4 * (j % 2)) & 15
                code = nibble - 16 if nibble > 7 else nibble
            values[i, j] = code * layout.scales[i].float()
    return values


cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 6),
        "m": st.integers(1, 40),
        "bits": st.sampled_from([4, 8]),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_rounding(case: dict[str, Any]) -> None:
    weight = random_rows(case["n"], case["m"], case["seed"])
    layout = IntegerRows.quantize(weight, case["bits"], case["dtype"])
    values = layout.dequantize()
    assert torch.equal(values, slow(layout))
    step = layout.scales.float().unsqueeze(1)
    assert ((values - weight).abs() <= 0.5001 * step).all()
    assert (values * weight >= 0).all()
    # The largest of each row gets the largest code: no part of the range is given away.
    limit = 2 ** (case["bits"] - 1) - 1
    assert torch.equal((values / step).abs().amax(1).round(), torch.full((case["n"],), float(limit)))


@given(cases)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(case: dict[str, Any]) -> None:
    layout = IntegerRows.quantize(random_rows(case["n"], case["m"], case["seed"]), case["bits"], case["dtype"])
    kind, spec = parse_spec("m", json.loads(json.dumps(describe(layout))))
    assert (kind, spec) == (IntegerRows, layout.spec)
    stored = layout.state_dict()
    assert list(stored) == list(spec.tensors())
    assert torch.equal(kind(spec, dict(stored)).dequantize(), layout.dequantize())
    width = case["m"] if case["bits"] == 8 else (case["m"] + 1) // 2
    assert layout.items() == {"codes": case["n"] * width, "scales": 2 * case["n"]}
    assert sum(layout.items().values()) == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [33, 64])
def test_looking_up_rows_is_indexing_the_matrix(bits: int, width: int) -> None:
    layout = IntegerRows.quantize(random_rows(11, width), bits, "float16")
    whole = layout.dequantize()
    ids = torch.tensor([[3, 0, 10], [3, 3, 7]])
    assert torch.equal(layout.dequantize(ids), whole[ids])
    assert torch.equal(layout.dequantize(ids[0, 0]), whole[3])
    assert torch.equal(layout.dequantize(slice(2, 5)), whole[2:5])


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_are_exact(bits: int) -> None:
    weight = random_rows(3, 9)
    weight[1] = 0
    layout = IntegerRows.quantize(weight, bits, "float16")
    assert torch.equal(layout.dequantize()[1], torch.zeros(9))
    assert not layout.codes[1].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_too_small_for_the_scale_have_codes_of_zero(bits: int) -> None:
    layout = IntegerRows.quantize(torch.full((1, 6), 1e-9), bits, "float16")
    assert not layout.codes.any()


def test_half_a_step_holds_where_the_scale_is_subnormal() -> None:
    """float16 has few values below 6e-5: a scale that is rounded down there would clip the row's largest weights."""
    weight = torch.linspace(-1, 1, 50).unsqueeze(0) * torch.logspace(-5, -3, 40).unsqueeze(1)
    layout = IntegerRows.quantize(weight, 8, "float16")
    error = (layout.dequantize() - weight).abs().amax(1)
    assert (error <= 0.5001 * layout.scales.float()).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_beyond_the_scales_dtype_are_refused_with_the_way_out(bits: int) -> None:
    weight = torch.full((2, 4), 1e8)
    with pytest.raises(SignbitError, match=r"scales .*scale_dtype=bfloat16"):
        IntegerRows.quantize(weight, bits, "float16")
    assert torch.allclose(IntegerRows.quantize(weight, bits, "bfloat16").dequantize(), weight, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sources_of_any_float_dtype(dtype: torch.dtype) -> None:
    weight = random_rows(4, 10).to(dtype)
    layout, wide = (IntegerRows.quantize(w, 8, "float16") for w in (weight, weight.float()))
    assert torch.equal(layout.dequantize(), wide.dequantize())


def test_a_models_dtype_does_not_reach_the_stored_tensors() -> None:
    layout = IntegerRows.quantize(random_rows(4, 10), 8, "float16").to(torch.bfloat16)
    assert (layout.codes.dtype, layout.scales.dtype) == (torch.int8, torch.float16)


@pytest.mark.parametrize("change", [{"bits": 3}, {"bits": None}, {"shape": ["a", 3]}, {"scale_dtype": 16}], ids=str)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(IntegerRows.quantize(random_rows(2, 4), 8, "float16"))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("lm_head", {**good, **change})
