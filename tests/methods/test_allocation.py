from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matrices import random_inputs, random_weight
from signbit.methods.allocation import allocate, needs
from signbit.methods.options import LinearSurvey

measures = st.lists(st.floats(0, 100), min_size=1, max_size=40)


@given(measures, st.integers(1, 16), st.integers(0, 15))
def test_blocks_of_one_size_keep_exactly_what_is_asked_for(needed: list[float], keep: int, more: int) -> None:
    of = min(16, keep + more)
    counts = allocate(needed, [100] * len(needed), keep, of)
    assert sum(counts) == keep * len(needed)
    assert all(1 <= count <= of for count in counts)


@given(measures, st.data(), st.integers(1, 8))
def test_unlike_blocks_never_keep_more(needed: list[float], data: st.DataObject, keep: int) -> None:
    count = len(needed)
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
    counts = allocate(needed, sizes, keep, 8)
    total = sum(n * size for n, size in zip(counts, sizes, strict=True))
    assert total <= keep * sum(sizes)
    # And there is no room for one more anywhere.
    left = keep * sum(sizes) - total
    assert all(n == 8 or size > left for n, size in zip(counts, sizes, strict=True))


def test_who_needs_more_keeps_more() -> None:
    assert allocate([1, 2, 3], [5, 5, 5], 4, 8) == [3, 4, 5]
    assert allocate([3, 1, 1, 1], [5] * 4, 4, 8) == [6, 4, 3, 3]
    assert allocate([7, 7, 7], [5] * 3, 4, 8) == [4, 4, 4]
    assert allocate([1, 9], [5] * 2, 1, 4) == [1, 1]
    assert allocate([1, 9], [5] * 2, 8, 8) == [8, 8]


class Surveyed:
    """Two blocks, of which the second has larger weights and the first inputs with an outlier."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, *, inputs: bool) -> Iterator[dict[str, LinearSurvey]]:
        self.asked.append(inputs)
        for block in range(2):
            x = random_inputs(100, 30, block)
            if block == 0:
                x[:, 4] *= 1e6
            hessian = x.T @ x / len(x) if inputs else None
            yield {name: LinearSurvey((block + 1) * random_weight(20, 30, block), hessian) for name in "ab"}


def test_norm() -> None:
    survey = Surveyed()
    found, sizes = needs(survey, "norm")
    weights = [(block + 1) * random_weight(20, 30, block) for block in range(2)]
    assert found == pytest.approx([float(torch.cat([w, w]).norm()) for w in weights], rel=1e-5)
    assert sizes == [1200, 1200] and survey.asked == [False]


def test_outliers() -> None:
    survey = Surveyed()
    found, _ = needs(survey, "outlier")
    expected = []
    for block in range(2):
        w, x = (block + 1) * random_weight(20, 30, block), random_inputs(100, 30, block)
        if block == 0:
            x[:, 4] *= 1e6
        size = w.abs()
        scores = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * x.norm(dim=0) ** 0.5
        expected.append(float((scores > 6 * scores.mean()).float().mean()))
    assert found == pytest.approx(expected) and found[0] > found[1] and survey.asked == [True]
