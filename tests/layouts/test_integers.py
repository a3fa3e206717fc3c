from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import Integers, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from signbit.layouts.fields import field_widths, pack_fields, packed_bytes, unpack_fields
from stored import check_made_again


def random_parts(n: int, m: int, bits: int, group_size: int, zeros: bool, dtype: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of encode."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-m // (group_size or m))
    return {
        "codes": torch.randint(0, 2**bits, (n, m), dtype=torch.uint8, generator=generator),
        "scales": torch.randn(n, groups, generator=generator).abs().to(SCALE_DTYPES[dtype]),
        "zeros": torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if zeros else None,
        "bits": bits,
        "group_size": group_size,
    }


def slow_values(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Weight by weight, each product rounded to float32."""
    n, m = codes.shape
    values = np.zeros((n, m), np.float32)
    for i in range(n):
        for j in range(m):
            group = j // (group_size or m)
            zero = 2 ** (bits - 1) if zeros is None else int(zeros[i, group])
            values[i, j] = np.float32(int(codes[i, j]) - zero) * np.float32(scales[i, group].item())
    return torch.from_numpy(values)


def slow_read(row: bytes, m: int, bits: int) -> list[int]:
    """Read a packed row bit by bit, as the format says."""
    integers, start, shift = [0] * m, 0, 0
    for width in field_widths(bits):
        for j in range(m):
            for bit in range(width):
                at = j * width + bit
                integers[j] |= (row[start + at // 8] >> at % 8 & 1) << shift + bit
        start += 4 * -(-m * width // 32)
        shift += width
    assert start == len(row)
    return integers


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 4),
        "m": st.integers(1, 70),
        "bits": st.integers(2, 8),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 128]),
        "zeros": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(st.integers(1, 8), st.integers(0, 80), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_fields(bits: int, m: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, m), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_fields(codes, bits)
    assert packed.shape == (2, 3, packed_bytes(m, bits))
    assert torch.equal(unpack_fields(packed, m, bits), codes)
    for row, wanted in zip(packed.view(6, -1), codes.view(6, -1), strict=True):
        assert slow_read(bytes(row.tolist()), m, bits) == wanted.tolist()
    # The bits themselves, and less than a word for each part of an integer.
    assert m * bits <= 8 * packed.shape[-1] < m * bits + 32 * len(field_widths(bits))


@given(shapes)
@settings(deadline=None, max_examples=80)
def test_dequantized_is_the_slow_product_to_the_bit(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = Integers.encode(**parts)
    whole = layout.dequantize()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, slow_values(**parts))
    for rows in (slice(0, 1), slice(-2, None), slice(0, None, 2), slice(shape["n"], None)):
        assert torch.equal(layout.dequantize(rows), whole[rows])


@given(shapes)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    layout = Integers.encode(**random_parts(**shape))
    check_made_again(layout)
    # Random codes cannot take less than their bits.
    assert 8 * layout.items()["codes"] >= shape["n"] * shape["m"] * shape["bits"]
    assert layout.nominal_bits == shape["bits"]


@pytest.mark.parametrize(("bits", "codes", "zeros"), [(2, 144, 4), (3, 144 + 72, 8), (4, 288, 4), (8, 576, 8)])
def test_items(bits: int, codes: int, zeros: int) -> None:
    """A row of 576 columns in 5 groups of 128."""
    layout = Integers.encode(**random_parts(2, 576, bits, 128, True, "float16"))
    assert layout.items() == {"codes": 2 * codes, "scales": 2 * 5 * 2, "zeros": 2 * zeros}
    layout = Integers.encode(**random_parts(2, 576, bits, 128, False, "float16"))
    assert layout.items() == {"codes": 2 * codes, "scales": 2 * 5 * 2}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("width", "group_size"), [(33, 0), (64, 16)])
def test_looking_up_rows_is_indexing_the_matrix(bits: int, width: int, group_size: int) -> None:
    layout = Integers.encode(**random_parts(11, width, bits, group_size, group_size > 0, "float16"))
    whole = layout.dequantize()
    ids = torch.tensor([[3, 0, 10], [3, 3, 7]])
    assert torch.equal(layout.dequantize(ids), whole[ids])
    assert torch.equal(layout.dequantize(ids[0, 0]), whole[3])
    assert torch.equal(layout.dequantize(slice(2, 5)), whole[2:5])


def test_a_models_dtype_does_not_reach_the_stored_tensors() -> None:
    layout = Integers.encode(**random_parts(4, 10, 8, 0, True, "float16")).to(torch.bfloat16)
    assert (layout.codes.dtype, layout.scales.dtype) == (torch.uint8, torch.float16)


def test_scales_beyond_their_dtype_are_refused_with_the_way_out() -> None:
    parts = random_parts(2, 40, 4, 16, True, "float16")
    parts["scales"] = torch.full(parts["scales"].shape, 70_000.0).to(torch.float16)
    with pytest.raises(SignbitError, match=r"^scales .*scale_dtype=bfloat16"):
        Integers.encode(**parts)


@pytest.mark.parametrize(
    "change",
    [{"bits": 1}, {"bits": 9}, {"bits": None}, {"bits": 3.0}, {"group_size": -1}, {"shape": ["a", 3]}, {"surprise": 0}],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(Integers.encode(**random_parts(2, 40, 4, 16, True, "float16")))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("lm_head", {**good, **change})
