"""Blocks of GGUF, decoded by hand, against what signbit dequantizes: bit for bit."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from q1_0 import decode_q1_0
from signbit.exporting.gguf_blocks import exact_bytes, exact_type
from signbit.layouts import Integers, Layout, SignPlanes


def signs(
    n: int = 6,
    m: int = 256,
    group: int = 128,
    planes: int = 1,
    mean: bool = False,
    columns: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Layout:
    generator = torch.Generator().manual_seed(n * m)
    groups = -(-m // (group or m))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    negative = torch.rand(planes, n, m, generator=generator) < 0.5
    return SignPlanes.encode(
        negative,
        random(planes, n, groups),
        random(n, groups) if mean else None,
        group,
        random(m) if columns else None,
    )


def integers(bits: int, n: int = 6, m: int = 256, group: int = 64, zeros: bool = False) -> Layout:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-m // (group or m))

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)

    scales = torch.rand(n, groups, generator=generator).half()
    return Integers.encode(codes(n, m), scales, codes(n, groups) if zeros else None, bits, group)


@pytest.mark.parametrize("group", [0, 128, 256])
def test_signs(group: int) -> None:
    layout = signs(m=512, group=group)
    assert exact_type(layout) == Type.Q1_0
    assert np.array_equal(decode_q1_0(exact_bytes(layout, Type.Q1_0)), layout.dequantize().numpy())


def test_one_block() -> None:
    layout = signs(n=1, m=128)
    assert np.array_equal(decode_q1_0(exact_bytes(layout, Type.Q1_0)), layout.dequantize().numpy())


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize(("bits", "zeros"), [(2, False), (3, True), (4, False), (4, True), (7, True), (8, False)])
def test_integers(bits: int, zeros: bool, group: int) -> None:
    layout = integers(bits, group=group, zeros=zeros)
    kind = exact_type(layout)
    assert kind == (Type.Q4_0 if bits == 4 and not zeros else Type.Q8_0)
    assert np.array_equal(gguf.dequantize(exact_bytes(layout, kind), kind), layout.dequantize().numpy())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"planes": 2}, "2 planes of signs"),
        ({"mean": True}, "groups have means"),
        ({"columns": True}, "columns have scales"),
        ({"m": 192, "group": 0}, "192 columns are not whole blocks of 128"),
        ({"group": 64}, "groups of 64 columns are not whole blocks"),
    ],
)
def test_what_is_not_exact(options: dict[str, Any], reason: str) -> None:
    found = exact_type(signs(**options))
    assert isinstance(found, str)
    assert reason in found


def test_bfloat16_scales_only_where_float16_has_them() -> None:
    assert exact_type(signs(dtype=torch.bfloat16)) == Type.Q1_0  # eight bits of mantissa fit eleven
    large = SignPlanes.encode(torch.zeros(1, 2, 128, dtype=torch.bool), torch.full((1, 2, 1), 1e6).bfloat16(), None, 0)
    assert "do not fit float16" in str(exact_type(large))


def test_nine_bits_and_other_layouts() -> None:
    assert "numbers of 9 bits" in str(exact_type(integers(8, zeros=True)))
    assert "48 columns" in str(exact_type(integers(4, m=48, group=0)))
