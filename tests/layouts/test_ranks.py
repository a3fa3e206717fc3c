import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signbit.layouts.bits import packed_width
from signbit.layouts.ranks import MAX_OF, choices, pack_ranks, rank, rank_bits, rank_count, unpack_ranks
from signbit.layouts.trits import LARGEST_BYTE, pack_trits, trit_width, unpack_trits

PAIRS = [(keep, of) for of in range(1, MAX_OF + 1) for keep in range(of + 1)]


@given(st.sampled_from(PAIRS), st.integers(0, 9), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_ranks_come_back(pair: tuple[int, int], cells: int, rows: int, seed: int) -> None:
    keep, of = pair
    order = torch.rand(rows, cells, of, generator=torch.Generator().manual_seed(seed)).argsort(2)
    kept = order < keep
    ranks = rank(kept, keep)
    assert torch.equal(choices(keep, of)[ranks], kept)
    bits = rank_bits(keep, of)
    packed = pack_ranks(ranks, bits)
    assert packed.shape == (rows, packed_width(cells * bits))
    assert torch.equal(unpack_ranks(packed, cells, bits), ranks)


@pytest.mark.parametrize(("keep", "of"), [(4, 8), (2, 8), (1, 4), (3, 7), (5, 5), (1, 1), (8, 16)])
def test_every_choice_has_its_own_rank_in_order(keep: int, of: int) -> None:
    numbers = [number for number in range(2**of) if number.bit_count() == keep]
    assert [sum(int(bit) << j for j, bit in enumerate(row)) for row in choices(keep, of)] == numbers
    assert torch.equal(rank(choices(keep, of), keep), torch.arange(math.comb(of, keep)))
    assert rank_count(keep, of) == len(numbers)


def test_bits_of_the_papers_settings() -> None:
    found = [rank_bits(*pair) for pair in ((4, 8), (2, 8), (1, 4), (5, 8), (6, 8), (8, 8), (8, 16))]
    assert found == [7, 5, 2, 6, 5, 0, 14]


@pytest.mark.parametrize(("keep", "of"), PAIRS)
def test_a_bitmap_is_never_smaller(keep: int, of: int) -> None:
    assert rank_bits(keep, of) < of
    for cells in range(1, 100):
        assert packed_width(cells * rank_bits(keep, of)) <= packed_width(cells * of)


@given(st.integers(0, 60), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_trits_come_back(count: int, rows: int, seed: int) -> None:
    trits = torch.randint(3, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_trits(trits)
    assert packed.shape == (rows, trit_width(count)) and trit_width(count) % 4 == 0
    assert int(packed.max()) <= LARGEST_BYTE if packed.numel() else True
    assert torch.equal(unpack_trits(packed, count), trits.float())


def test_trits_are_digits_lowest_first() -> None:
    trits = torch.tensor([[1, 0, 2, 0, 0, 2, 2, 2, 2, 2, 1]], dtype=torch.uint8)
    assert pack_trits(trits).tolist() == [[1 + 2 * 9, 242, 1, 0]]
