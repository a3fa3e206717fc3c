import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signbit.layouts.bits import as_signs, pack_bits, packed_width, unpack_bits, unpack_floats, unpack_signs

WIDTHS = [1, 31, 32, 33, 100, 576, 4097]


def random_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def as_integer(bits: list[bool]) -> bytes:
    """A row as one little-endian integer: bit j of the number is bit j of the row; whole 32-bit words."""
    words = -(-len(bits) // 32)
    return sum(bit << j for j, bit in enumerate(bits)).to_bytes(4 * words, "little")


@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    width=st.one_of(st.sampled_from(WIDTHS), st.integers(1, 200)),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_packs_and_unpacks(leading: list[int], width: int, seed: int) -> None:
    bits = random_bits(*leading, width, seed=seed)
    packed = pack_bits(bits)
    assert packed.shape == (*leading, packed_width(width))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, width), bits)
    assert torch.equal(unpack_signs(packed, width), as_signs(bits))
    assert torch.equal(unpack_floats(packed, width, 0.0, 1.0), bits.float())


def test_no_rows() -> None:
    packed = pack_bits(random_bits(0, 40))
    assert packed.shape == (0, 8)
    assert unpack_bits(packed, 40).shape == unpack_signs(packed, 40).shape == (0, 40)


@pytest.mark.parametrize("width", WIDTHS)
def test_bits_are_lsb_first_and_rows_padded_with_zeros_to_words(width: int) -> None:
    bits = random_bits(3, width, seed=width)
    bits[1] = True  # no zeros of its own: what is zero in its last bytes is padding
    packed = pack_bits(bits)
    for row, expected in zip(packed, bits.tolist(), strict=True):
        assert bytes(row.tolist()) == as_integer(expected)


def test_one_is_negative() -> None:
    packed = torch.tensor([[0b0000_0110, 0, 0, 0x80]], dtype=torch.uint8)
    assert unpack_signs(packed, 4).tolist() == [[1.0, -1.0, -1.0, 1.0]]
    assert unpack_signs(packed, 32)[0, 31] == -1.0
    assert as_signs(torch.tensor([False, True])).tolist() == [1.0, -1.0]


def test_floats_take_any_pair_of_values() -> None:
    packed = pack_bits(torch.tensor([[False, True, True]]))
    assert unpack_floats(packed, 3, 0.5, -3.0).tolist() == [[0.5, -3.0, -3.0]]


def test_views_of_other_tensors_pack() -> None:
    """Columns of a larger matrix are neither contiguous nor aligned to the 64-bit words that packing works in."""
    bits = random_bits(5, 100)
    assert torch.equal(pack_bits(bits[1:, 3:67]), pack_bits(bits[1:, 3:67].clone()))
    assert torch.equal(pack_bits(bits[2, 3:67]), pack_bits(bits[2, 3:67].clone()))
    assert torch.equal(pack_bits(bits.T), pack_bits(bits.T.clone()))
    packed = pack_bits(bits)
    assert torch.equal(unpack_bits(packed[::2], 100), bits[::2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_only_booleans_pack(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        pack_bits(torch.zeros(2, 32, dtype=dtype))
