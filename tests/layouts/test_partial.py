import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import Partial, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from signbit.layouts.bits import pack_integers, unpack_bits, unpack_integers
from signbit.layouts.positions import STRIP_ROWS, encode
from stored import check_made_again


def random_parts(
    n: int,
    m: int,
    group_size: int,
    share: float,
    code_bits: int,
    row_codes: bool,
    mean: bool,
    dtype: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of encode; ``share`` of the weights are salient, at random."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-m // (group_size or m))

    def coefficients(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(SCALE_DTYPES[dtype])

    return {
        "negative": torch.rand(n, m, generator=generator) < 0.5,
        "scales": coefficients(n, groups).abs(),
        "means": coefficients(n, groups) if mean else None,
        "salient": torch.rand(n, m, generator=generator) < share,
        "q": torch.randint(0, 2 ** (code_bits - 1), (n, m), generator=generator).to(torch.uint8),
        "code_bits": code_bits,
        "code_scales": coefficients(n, 1 if row_codes else groups).abs(),
        "code_offsets": coefficients(n, 1 if row_codes else groups) if mean else None,
        "group_size": group_size,
    }


PARTS: dict[str, Any] = {
    "n": 40,
    "m": 100,
    "group_size": 32,
    "share": 0.1,
    "code_bits": 8,
    "row_codes": True,
    "mean": True,
    "dtype": "float16",
}


def some_parts(**changes: Any) -> dict[str, Any]:
    return random_parts(**{**PARTS, **changes})


def slow(
    negative: Tensor,
    scales: Tensor,
    means: Tensor | None,
    salient: Tensor,
    q: Tensor,
    code_bits: int,
    code_scales: Tensor,
    code_offsets: Tensor | None,
    group_size: int,
) -> Tensor:
    """Weight by weight, each step rounded to float32."""
    n, m = negative.shape
    values = np.zeros((n, m), np.float32)
    for i in range(n):
        for j in range(m):
            group = j // (group_size or m)
            sign = np.float32(-1 if negative[i, j] else 1)
            if salient[i, j]:
                code = group if code_scales.shape[1] > 1 else 0
                level = sign * np.float32(int(q[i, j]) + 0.5)
                values[i, j] = np.float32(code_scales[i, code].item()) * level
                if code_offsets is not None:
                    values[i, j] += np.float32(code_offsets[i, code].item())
            else:
                values[i, j] = np.float32(scales[i, group].item()) * sign
                if means is not None:
                    values[i, j] += np.float32(means[i, group].item())
    return torch.from_numpy(values)


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "m": st.integers(1, 70),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 64, 128]),
        "share": st.sampled_from([0.0, 0.005, 0.05, 0.1, 0.3, 0.6, 1.0]),
        "code_bits": st.integers(2, 8),
        "row_codes": st.booleans(),
        "mean": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_dequantized_is_the_slow_sum_to_the_bit(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = Partial.encode(**parts)
    layout.check("m")
    whole = layout.dequantize()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, slow(**parts))
    n = shape["n"]
    for rows in (
        slice(0, 1),
        slice(-2, None),
        slice(0, None, 2),
        slice(n // 3, n // 2 + 1),
        slice(15, 17),
        slice(3, 2),
    ):
        assert torch.equal(layout.dequantize(rows), whole[rows])


@given(shapes)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    layout = Partial.encode(**random_parts(**shape))
    check_made_again(layout)


@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_any_run_of_integers_can_be_read(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (count,), generator=generator)
    planes = pack_integers(values, bits)
    start, stop = sorted(torch.randint(0, count + 1, (2,), generator=generator).tolist())
    assert torch.equal(unpack_integers(planes, start, stop), values[start:stop].float())
    assert [sum(int(bit) << b for b, bit in enumerate(column)) for column in unpack_bits(planes, count).T] == (
        values.tolist()
    )


# --- where the salient weights are ------------------------------------------------------------------------------------


def slow_gaps(marked: Tensor, gap_bits: int) -> list[int]:
    escape, gaps = 2**gap_bits - 1, []
    for strip in marked.split(STRIP_ROWS):
        gap = 0
        for mark in strip.flatten().tolist():
            if mark:
                gaps += [escape] * (gap // escape) + [gap % escape]
                gap = 0
            else:
                gap += 1
    return gaps


@pytest.mark.parametrize("share", [0.0, 0.003, 0.02, 0.1, 0.2, 0.3, 0.45, 1.0])
@pytest.mark.parametrize(("n", "m"), [(40, 50), (16, 128), (1, 300), (100, 1)])
def test_the_smallest_storage_is_taken(n: int, m: int, share: float) -> None:
    marked = torch.rand(n, m, generator=torch.Generator().manual_seed(0)) < share
    found = encode(marked)

    def padded(bits: int) -> int:
        return 4 * math.ceil(bits / 32)

    ends = 4 * math.ceil(n / STRIP_ROWS)
    sizes = {bits: bits * padded(len(slow_gaps(marked, bits))) + 2 * ends for bits in range(2, 17)}
    bitmap = n * padded(m) + ends
    assert found.stream.nbytes + found.ends.nbytes == min(bitmap, *sizes.values())
    if found.gap_bits:
        assert unpack_integers(found.stream, 0, found.gaps).tolist() == slow_gaps(marked, found.gap_bits)
    else:
        assert torch.equal(unpack_bits(found.stream, m), marked)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_positions_take_little_more_than_their_entropy(share: float) -> None:
    marked = torch.rand(256, 512, generator=torch.Generator().manual_seed(1)) < share
    layout = Partial.encode(**{**some_parts(n=256, m=512, group_size=0, mean=False), "salient": marked})
    weights, count = marked.numel(), int(marked.sum())
    choices = (math.lgamma(weights + 1) - math.lgamma(count + 1) - math.lgamma(weights - count + 1)) / math.log(2)
    assert choices <= 8 * layout.items()["masks"] <= min(1.17 * choices, 1.01 * weights)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_rows_are_found_without_the_rest(share: float) -> None:
    """What a strip is stored as has no part in another: destroy the others and it is the same."""
    parts = some_parts(n=64, share=share)
    layout = Partial.encode(**parts)
    rows, whole = slice(32, 48), layout.dequantize()
    before, after = layout.ends[1].tolist(), layout.ends[2].tolist()
    for name, column in [("codes", 0)] + ([("positions", 1)] if layout.spec.gap_bits else []):
        planes = layout.get_buffer(name)
        kept = planes[:, before[column] // 8 : -(-after[column] // 8)].clone()
        planes.fill_(255)
        planes[:, before[column] // 8 : -(-after[column] // 8)] = kept
    assert torch.equal(layout.dequantize(rows), whole[rows])


# --- counting ---------------------------------------------------------------------------------------------------------


def test_items() -> None:
    parts = some_parts(n=32, m=64, group_size=32, code_bits=4)
    parts["salient"] = torch.zeros(32, 64, dtype=torch.bool)
    parts["salient"][:, ::8] = True  # gaps of 7 take 4 bits (3 bits: an escape each), and 256 of them 4 words
    layout = Partial.encode(**parts)
    assert (layout.spec.salient, layout.spec.gap_bits, layout.spec.gaps) == (256, 4, 256)
    assert layout.items() == {
        "signs": 32 * 8,
        "scales": 2 * (32 * 2 + 32),
        "means": 2 * (32 * 2 + 32),
        "masks": 4 * 32 + 2 * 2 * 4,
        "codes": 3 * 32,
    }
    assert layout.nominal_bits == pytest.approx(1 + 3 / 8)
    symmetric = Partial.encode(**{**parts, "means": None, "code_offsets": None})
    assert symmetric.items() == {item: size for item, size in layout.items().items() if item != "means"}


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scales", "means", "code_scales", "code_offsets"])
def test_coefficients_beyond_their_dtype_are_refused_with_the_way_out(name: str) -> None:
    parts = some_parts()
    parts[name] = torch.full(parts[name].shape, 70_000.0).to(torch.float16)
    with pytest.raises(SignbitError, match=rf"^{name} .*scale_dtype=bfloat16"):
        Partial.encode(**parts)


@pytest.mark.parametrize("name", ["means", "code_offsets"])
def test_a_mean_without_the_other_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="means and code_offsets"):
        Partial.encode(**some_parts() | {name: None})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 0.5]},
        {"group_size": -1},
        {"code_group_size": 7},
        {"code_group_size": None},
        {"code_bits": 1},
        {"code_bits": 9},
        {"code_bits": True},
        {"salient": 4001},
        {"salient": -1},
        {"gap_bits": 1},
        {"gap_bits": 17},
        {"gap_bits": 0},
        {"gaps": 4001},
        {"gaps": 2.0},
        {"scale_dtype": "float32"},
        {"surprise": 0},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(Partial.encode(**some_parts()))
    assert good["gap_bits"] > 1
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("model.layers.0.q_proj", {**good, **change})


def damaged(layout: Partial, name: str, index: Any, value: int) -> Partial:
    tensors = {key: tensor.clone() for key, tensor in layout.state_dict().items()}
    tensors[name][index] = value
    return Partial(layout.spec, tensors)


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("value", [-1, 2**31 - 1, -(2**31), 0, 1])
@pytest.mark.parametrize("strip", [0, 1, 2])
def test_ends_that_cannot_be_are_refused(share: float, strip: int, value: int) -> None:
    layout = Partial.encode(**some_parts(share=share))
    for column in range(layout.ends.shape[1]):
        with pytest.raises(SignbitError, match=r"^q_proj\.(ends|positions) .*damaged"):
            damaged(layout, "ends", (strip, column), value).check("q_proj")


@pytest.mark.parametrize("share", [0.02, 0.1, 0.6])
@pytest.mark.parametrize("value", [0, 255])
def test_positions_that_are_not_those_counted_are_refused(share: float, value: int) -> None:
    layout = Partial.encode(**some_parts(share=share))
    with pytest.raises(SignbitError, match=r"^q_proj\.positions .*damaged"):
        damaged(layout, "positions", (slice(None), slice(0, 8)), value).check("q_proj")


@given(st.sampled_from([0.02, 0.1, 0.6]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_what_passes_the_check_never_reads_out_of_bounds(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = Partial.encode(**some_parts(share=share))
    for name in ("positions", "ends"):
        stored = layout.get_buffer(name).view(torch.uint8)
        at = torch.randint(0, stored.numel(), (1,), generator=generator)
        stored.view(-1)[at] ^= torch.randint(0, 256, (1,), generator=generator).to(torch.uint8)
    try:
        layout.check("q_proj")
    except SignbitError:
        return
    assert layout.dequantize().shape == (40, 100)
    assert layout.dequantize(slice(16, 20)).shape == (4, 100)


@pytest.mark.parametrize("change", ["half", "bfloat16"])
def test_a_models_dtype_does_not_reach_the_stored_tensors(change: str) -> None:
    layout = Partial.encode(**some_parts(dtype="float16" if change != "half" else "bfloat16"))
    before = {name: tensor.clone() for name, tensor in layout.state_dict().items()}
    getattr(layout, change)()
    for name, tensor in layout.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
