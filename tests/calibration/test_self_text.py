"""Text that the model itself writes."""

import pytest
import torch
from torch import Tensor

from signbit.calibration.self_text import GREEDY_TOKENS, write_tokens
from signbit.progress import Silent
from tiny import SPECIAL_IDS, VOCAB, build


def write(family: str = "llama", samples: int = 6, seqlen: int = 24, seed: int = 0) -> Tensor:
    return write_tokens(build(family), samples, seqlen, seed, Silent())


def test_same_seed_same_text() -> None:
    text = write()
    torch.manual_seed(7)  # the global generator has no say
    assert torch.equal(write(), text)


def test_other_seed_other_text() -> None:
    assert not torch.equal(write(seed=1), write(seed=0))


@pytest.mark.parametrize("seqlen", [1, 2, 24])
def test_shape_and_range(seqlen: int) -> None:
    text = write(seqlen=seqlen)
    assert text.shape == (6, seqlen)
    assert text.dtype == torch.int64
    assert 0 <= int(text.min()) <= int(text.max()) < VOCAB


@torch.no_grad()
def test_begins_greedily_then_samples() -> None:
    model, text = build("gpt2"), write("gpt2")
    best = model(text).logits.argmax(-1)
    assert torch.equal(text[:, 1 : 1 + GREEDY_TOKENS], best[:, :GREEDY_TOKENS])
    assert not torch.equal(text[:, 1 + GREEDY_TOKENS :], best[:, GREEDY_TOKENS:-1])


def test_sampling_follows_the_model() -> None:
    """Sampled tokens are likelier under the model than random ones are."""
    model = build("llama")
    text = write(samples=32, seqlen=40)
    with torch.no_grad():
        chances = model(text[:, :-1]).logits.softmax(-1)
    sampled = chances.gather(2, text[:, 1:, None])[:, GREEDY_TOKENS:]
    wanted = chances.square().sum(-1)[:, GREEDY_TOKENS:]  # the mean of p over tokens that are drawn with p
    assert float(wanted.mean()) > 2 / VOCAB
    assert float(sampled.mean()) == pytest.approx(float(wanted.mean()), rel=0.3)


def test_no_sequence_begins_with_a_special_token() -> None:
    first = write(samples=4000, seqlen=1).flatten().tolist()
    assert not set(first) & set(SPECIAL_IDS.values())
    assert len(set(first)) == VOCAB - 3  # and every other token begins some


def test_several_end_tokens() -> None:
    """As in Llama 3's config: eos_token_id is a list."""
    model = build("llama")
    model.config.eos_token_id = [1, 5, 6]
    first = set(write_tokens(model, 4000, 1, 0, Silent()).flatten().tolist())
    assert first == set(range(VOCAB)) - {0, 1, 2, 5, 6}
