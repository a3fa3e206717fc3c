"""Choices by temperature, nucleus, penalties and biases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signbit.serving.sampling import NotFiniteError, Sampler, Sampling, nucleus


@given(st.integers(1, 1000), st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_nucleus(size: int, top_p: float, seed: int) -> None:
    """As few as possible, the likeliest, and together at least top_p."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = logits.softmax(-1)
    kept, tokens = nucleus(probabilities, top_p)
    assert torch.equal(probabilities[tokens], kept)
    assert len(kept) == size or kept.sum() >= top_p - 1e-9
    assert kept[:-1].sum() < max(top_p, 1e-300)
    assert len(kept) == size or kept.min() >= probabilities[[i for i in range(size) if i not in tokens.tolist()]].max()


def test_frequencies() -> None:
    """What is drawn is the softmax at that temperature."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(Sampling(temperature=0.5, seed=0))
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, (logits / 0.5).softmax(-1), atol=0.03)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1e-9), Sampling(temperature=2, top_p=0)])
def test_ways_to_be_greedy(sampling: Sampling) -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -50.0])
    assert [Sampler(sampling).choose(logits) for _ in range(5)] == [1] * 5


def test_penalties_and_biases() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    sampler = Sampler(Sampling(frequency_penalty=0.6, presence_penalty=0.6))
    assert [sampler.choose(logits) for _ in range(5)] == [0, 1, 0, 0, 2]
    assert Sampler(Sampling(logit_bias={2: 100, 0: -100})).choose(logits) == 2


def test_not_finite() -> None:
    with pytest.raises(NotFiniteError):
        Sampler(Sampling(temperature=1)).choose(torch.tensor([0.0, float("nan")]))
