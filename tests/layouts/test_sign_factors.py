from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signbit.errors import SignbitError
from signbit.kernels import reference
from signbit.layouts import SignFactors, describe, parse_spec
from signbit.layouts.base import SCALE_DTYPES
from stored import check_made_again

shapes = st.fixed_dictionaries(
    {
        "paths": st.integers(1, 3),
        "n": st.integers(1, 40),
        "r": st.integers(1, 40),
        "m": st.integers(1, 70),
        "scales": st.tuples(st.booleans(), st.booleans(), st.booleans()),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


def random_parts(
    paths: int, n: int, r: int, m: int, scales: tuple[bool, bool, bool], dtype: str = "float16", seed: int = 0
) -> dict[str, Any]:
    """Arguments of encode."""
    generator = torch.Generator().manual_seed(seed)

    def scale(there: bool, length: int) -> torch.Tensor | None:
        return torch.randn(paths, length, generator=generator).to(SCALE_DTYPES[dtype]) if there else None

    return {
        "out_negative": torch.rand(paths, n, r, generator=generator) < 0.5,
        "in_negative": torch.rand(paths, r, m, generator=generator) < 0.5,
        "out_scales": scale(scales[0], n),
        "rank_scales": scale(scales[1], r),
        "in_scales": scale(scales[2], m),
        "scale_dtype": dtype,
    }


def dense(parts: dict[str, Any]) -> torch.Tensor:
    """W in float64."""

    def scale(name: str, length: int) -> torch.Tensor:
        kept = parts[name]
        return torch.ones(len(parts["out_negative"]), length).double() if kept is None else kept.double()

    U, V = (1 - 2 * parts[name].double() for name in ("out_negative", "in_negative"))
    h, inner, g = (
        scale(*one) for one in (("out_scales", U.shape[1]), ("rank_scales", U.shape[2]), ("in_scales", V.shape[2]))
    )
    return (h.unsqueeze(2) * (U @ (inner.unsqueeze(2) * V)) * g.unsqueeze(1)).sum(0)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_dequantized_is_the_product(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = SignFactors.encode(**parts)
    whole = layout.dequantize()
    torch.testing.assert_close(whole.double(), dense(parts), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layout.dequantize(slice(0, 1)), whole[:1], rtol=1e-5, atol=1e-4)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_products_need_no_dense_matrix(shape: dict[str, Any]) -> None:
    parts = random_parts(**shape)
    layout = SignFactors.encode(**parts)
    x = torch.randn(3, shape["m"], generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dense(parts).T
    bound = x.abs().double() @ dense(parts).abs().T + shape["r"]
    assert ((reference.matmul(x, layout).double() - expected).abs() <= 1e-4 * bound).all()
    for chain in layout.chains():
        assert [factor.shape for factor in chain] == [(shape["r"], shape["m"]), (shape["n"], shape["r"])]


@given(shapes)
@settings(deadline=None, max_examples=40)
def test_description_and_tensors_make_the_layout_again(shape: dict[str, Any]) -> None:
    check_made_again(SignFactors.encode(**random_parts(**shape)))


def test_items() -> None:
    layout = SignFactors.encode(**random_parts(2, 3, 33, 100, (True, False, True)))
    # 2 paths of 3 rows of 2 words and 33 rows of 4; 3 and 100 scales of 2 bytes
    assert layout.items() == {"signs": 2 * (3 * 8 + 33 * 16), "scales": 2 * 2 * 103}
    assert layout.nominal_bits == 2 * 33 * 103 / 300


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"paths": 0}, {"rank": -1}, {"out_scales": 1}, {"surprise": 1}], ids=str
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    good = describe(SignFactors.encode(**random_parts(1, 3, 2, 40, (True, True, True))))
    with pytest.raises(SignbitError, match="damaged layout description"):
        parse_spec("q_proj", {**good, **change})
