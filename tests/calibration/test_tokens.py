from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from signbit.calibration.tokens import check_seqlen, random_windows, tokenize
from signbit.errors import SignbitError

TOKENS = torch.arange(1000)  # each says where it stands


def test_windows_are_runs_of_the_text() -> None:
    windows = random_windows(TOKENS, samples=20, seqlen=50, seed=0)
    assert windows.shape == (20, 50)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(50))
    assert len(windows[:, 0].unique()) > 10


def test_windows_depend_on_the_seed_alone() -> None:
    windows = random_windows(TOKENS, 20, 50, seed=1)
    torch.manual_seed(5)
    assert torch.equal(random_windows(TOKENS, 20, 50, seed=1), windows)
    assert not torch.equal(random_windows(TOKENS, 20, 50, seed=2), windows)


def test_windows_reach_both_ends_of_the_text() -> None:
    starts = random_windows(TOKENS[:12], samples=2, seqlen=10, seed=0)[:, 0].tolist()
    for seed in range(1, 20):
        starts += random_windows(TOKENS[:12], samples=2, seqlen=10, seed=seed)[:, 0].tolist()
    assert set(starts) == {0, 1, 2}


@pytest.mark.parametrize(("tokens", "samples", "seqlen"), [(9, 1, 10), (499, 10, 100), (0, 1, 2)])
def test_a_text_with_less_than_half_of_the_tokens_is_refused(tokens: int, samples: int, seqlen: int) -> None:
    with pytest.raises(SignbitError, match=f"has {tokens} tokens, too few for {samples} samples of {seqlen}"):
        random_windows(TOKENS[:tokens], samples, seqlen, seed=0)


@pytest.mark.parametrize(("tokens", "samples", "seqlen"), [(10, 1, 10), (500, 10, 100)])
def test_just_enough_text(tokens: int, samples: int, seqlen: int) -> None:
    assert random_windows(TOKENS[:tokens], samples, seqlen, seed=0).shape == (samples, seqlen)


def test_a_text_is_one_sequence_whatever_its_length(recwarn: pytest.WarningsRecorder) -> None:
    text = tiny.TEXT * 3
    ids = tokenize(tiny.tokenizer(), text, tiny.CONFIGS["llama"]())
    assert ids.dim() == 1
    assert len(ids) > tiny.POSITIONS
    assert tiny.tokenizer().decode(ids) == text
    assert not recwarn.list


def test_the_tokenizers_own_special_tokens_stay() -> None:
    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *text.encode()]}

    assert tokenize(Tokenizer(), "ab", tiny.CONFIGS["llama"]()).tolist() == [1, 97, 98]


def test_a_tokenizer_of_another_model_is_refused() -> None:
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(SignbitError, match="do not belong together"):
        tokenize(lambda text, **_: {"input_ids": [config.vocab_size]}, "a", config)


def test_sequences_beyond_the_models_positions_are_refused() -> None:
    config = tiny.CONFIGS["llama"]()
    check_seqlen(config, tiny.POSITIONS)
    with pytest.raises(SignbitError, match=f"seqlen {tiny.POSITIONS + 1} .* at most {tiny.POSITIONS}"):
        check_seqlen(config, tiny.POSITIONS + 1)


def test_models_without_a_limit_take_any_length() -> None:
    text_config = SimpleNamespace()
    check_seqlen(SimpleNamespace(get_text_config=lambda: text_config), 10**9)
