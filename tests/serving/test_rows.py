"""Sequences in one forward come out as they do alone, whoever joins and leaves beside them."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from signbit.errors import SignbitError
from signbit.serving.engine import Engine
from signbit.serving.job import Failure, Job, Piece
from signbit.serving.rows import AloneRows, BatchedRows, Forward, open_rows
from signbit.serving.sampling import Sampling
from tiny import FAMILIES, SPECIAL_IDS, TEXT, VOCAB, build, tokenizer


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    choose = random.Random(0)
    ids = tokenizer()(TEXT)["input_ids"]
    starts = [choose.randrange(len(ids) - longest) for _ in range(count)]
    return [ids[start : start + choose.randint(1, longest)] for start in starts]


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers writes, without ever ending."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 2}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def written(engine: Engine, jobs: Sequence[tuple[list[int], dict[str, Any]]], every: int = 3) -> list[list[int]]:
    """The tokens of each (prompt, options), choice after choice, a new job let in at each third step if it fits."""
    engine.ends = frozenset()
    told: list[dict[int, list[int]]] = [{} for _ in jobs]

    def listen(number: int) -> Any:
        def tell(index: int, piece: Piece | Failure) -> None:
            assert isinstance(piece, Piece)
            told[number].setdefault(index, []).extend(entry.token for entry in piece.entries)

        return tell

    waiting = [Job(prompt, tell=listen(i), logprobs=0, **options) for i, (prompt, options) in enumerate(jobs)]
    step = 0
    while waiting or engine.busy:
        if waiting and step % every == 0 and engine.fits(waiting[0]):
            engine.add(waiting.pop(0))
        engine.step()
        step += 1
    assert not engine.rows.lengths
    return [[token for _, tokens in sorted(choices.items()) for token in tokens] for choices in told]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_as_alone(family: str) -> None:
    """Every family, beyond the sliding windows of those that have one (32 and 48 tokens)."""
    model = FAMILIES[family]()
    engine = Engine(model, tokenizer(), 2)
    assert engine.batched
    jobs = [(prompt, {"max_tokens": 4 + 9 * i}) for i, prompt in enumerate(prompts(4))]
    assert written(engine, jobs) == [greedy(model, prompt, options["max_tokens"]) for prompt, options in jobs]


def test_long_prompts_are_read_in_pieces() -> None:
    model = build("llama")
    jobs = [(prompt, {"max_tokens": 20}) for prompt in ([5, 6, 7], prompts(1, 200)[0] * 3)]
    jobs[1] = (jobs[1][0][:230], jobs[1][1])
    assert written(Engine(model, tokenizer(), 2), jobs) == [greedy(model, prompt, 20) for prompt, _ in jobs]


def test_sampling_does_not_depend_on_neighbours() -> None:
    model = build("qwen2")
    wanted = (prompts(1)[0], {"max_tokens": 25, "sampling": Sampling(temperature=1.0, top_p=0.9, seed=7)})
    alone = written(Engine(model, tokenizer(), 1), [wanted])[0]
    others = [(prompt, {"max_tokens": 11, "sampling": Sampling(temperature=1.0)}) for prompt in prompts(5)]
    assert written(Engine(model, tokenizer(), 4), [*others[:2], wanted, *others[2:]])[2] == alone
    assert len(set(alone)) > 5


def test_one_prompt_several_texts() -> None:
    model = build("llama")
    sampling = Sampling(temperature=1.0, seed=3)
    engine = Engine(model, tokenizer(), 4)
    assert not engine.fits(Job([1], 1, lambda index, piece: None, choices=5))
    both = written(engine, [(prompts(1)[0], {"max_tokens": 10, "choices": 3, "sampling": sampling})])[0]
    assert engine.read == len(prompts(1)[0])  # once
    one = written(engine, [(prompts(1)[0], {"max_tokens": 10, "sampling": sampling})])[0]
    assert both[:10] == one
    assert both[10:20] != one


def test_what_is_no_plain_attention_takes_turns() -> None:
    """ALiBi without positions that can be given: the cache would fit, the logits are tried."""
    usual = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, **SPECIAL_IDS}
    torch.manual_seed(0)
    falcon = FalconForCausalLM(FalconConfig(**usual, num_attention_heads=4, alibi=True)).eval()
    engine = Engine(falcon, tokenizer(), 3)
    jobs = [(prompt, {"max_tokens": 12}) for prompt in prompts(4, 60)]
    assert written(engine, jobs) == [greedy(falcon, prompt, 12) for prompt, _ in jobs]


def test_models_without_a_cache_are_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    try:
        forward = Forward(mamba)
    except SignbitError as error:
        assert "cannot be served" in str(error)
    else:  # from some version of transformers on, its states are a cache like others
        assert isinstance(open_rows(forward, 4), AloneRows)


def test_a_wrong_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    assert isinstance(open_rows(Forward(model), 4), BatchedRows)
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, position_ids=None, **options: real(ids, **options))
    forward = Forward(build("llama"))
    forward.model = model
    assert isinstance(open_rows(forward, 4), AloneRows)


def test_not_a_number_ends_one_request_only() -> None:
    """Keys of NaN are left behind where a later row is masked; they must not reach it."""
    model = build("llama")
    engine = Engine(model, tokenizer(), 2)
    heard: list[Piece | Failure] = []
    engine.add(Job([9] * 60, 5, lambda index, piece: heard.append(piece)))
    embeddings = model.get_input_embeddings().weight
    kept = embeddings[9].clone()
    with torch.no_grad():
        embeddings[9] = float("nan")
    engine.step()
    assert isinstance(heard[-1], Failure)
    with torch.no_grad():
        embeddings[9] = kept
    assert not engine.busy
    jobs = [(prompt, {"max_tokens": 8}) for prompt in prompts(3)]
    assert written(engine, jobs) == [greedy(model, prompt, 8) for prompt, _ in jobs]
