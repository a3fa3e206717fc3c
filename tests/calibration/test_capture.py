"""Running a model block by block is running the model; Hessians are those of the inputs that linears really get."""

import pytest
import torch
from torch import Tensor

from signbit import SignbitError
from signbit.architectures import find_blocks, linears_of, unfuse_experts
from signbit.calibration.capture import BlockInputs, HessianCapture
from signbit.precision import fast_float32
from tiny import FAMILIES, VOCAB, build

CPU = torch.device("cpu")


def batches(lengths: tuple[tuple[int, int], ...] = ((3, 64), (3, 64), (1, 64))) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, size, generator=generator) for size in lengths]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_model(family: str) -> None:
    """Bit for bit; 64 tokens, so that sliding windows (32 and 48) cut something off."""
    model = build(family)
    _, blocks = find_blocks(model)
    wanted: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda _m, _i, y: wanted.append(y[0] if isinstance(y, tuple) else y))
    with fast_float32():
        for batch in batches():
            model(batch, use_cache=False)
    handle.remove()
    inputs = BlockInputs(blocks)
    inputs.record(model, batches(), CPU)
    for index in range(len(blocks)):
        inputs.run(index, keep=True)
    assert len(inputs.hidden) == len(wanted) == 3
    for hidden, expected in zip(inputs.hidden, wanted, strict=True):
        assert torch.equal(hidden, expected)


def test_recording_needs_no_block_but_the_first() -> None:
    model = build("llama")
    _, blocks = find_blocks(model)
    model.model.layers[1:].to("meta")
    inputs = BlockInputs(blocks)
    inputs.record(model, batches(), CPU)
    assert torch.equal(inputs.hidden[1], model.model.embed_tokens(batches()[1]))


def test_recording_leaves_the_model_as_it_was() -> None:
    model = build("gemma3")
    before = model(batches()[0]).logits
    _, blocks = find_blocks(model)
    BlockInputs(blocks).record(model, batches(), CPU)
    assert torch.equal(model(batches()[0]).logits, before)


def test_run_without_keep_changes_nothing() -> None:
    model = build("llama")
    _, blocks = find_blocks(model)
    inputs = BlockInputs(blocks)
    inputs.record(model, batches(), CPU)
    before = [hidden.clone() for hidden in inputs.hidden]
    inputs.run(0, keep=False)
    assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, before, strict=True))


def test_infinite_hidden_states_are_refused() -> None:
    model = build("llama")
    _, blocks = find_blocks(model)
    inputs = BlockInputs(blocks)
    inputs.record(model, batches(), CPU)
    inputs.check_finite("model.layers.0")
    inputs.hidden[2][0, 5, 7] = float("inf")
    with pytest.raises(SignbitError, match=r"output of model\.layers\.0 contains NaN or infinite"):
        inputs.check_finite("model.layers.0")


def capture(family: str, ids: list[Tensor]) -> tuple[HessianCapture, dict[str, list[Tensor]]]:
    """The capture of the last block, and the inputs of its linears as independent hooks see them."""
    model = build(family)
    parts = unfuse_experts(model)
    fused = dict(build(family).named_parameters())
    for name, part in parts.items():
        model.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(part.take(fused[part.name]))
    _, blocks = find_blocks(model)
    linears = linears_of(blocks[-1])
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].flatten(0, -2)))
    inputs = BlockInputs(blocks)
    inputs.record(model, ids, CPU)
    for index in range(len(blocks) - 1):
        inputs.run(index, keep=True)
    hessians = HessianCapture(dict(linears))
    with hessians.watching(blocks[-1]):
        inputs.run(len(blocks) - 1, keep=False)
    inputs.run(len(blocks) - 1, keep=False)  # not watched any more: must not count
    half = {name: xs[: len(xs) // 2] for name, xs in seen.items()}
    return hessians, half


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
def test_hessians_are_those_of_the_inputs(family: str) -> None:
    found, seen = capture(family, batches())
    for group in found.by_input():
        for name in group:
            x = torch.cat(seen[name]).double()
            accumulator = found.hessians[group[0]]
            assert accumulator.tokens == len(x)
            torch.testing.assert_close(accumulator.hessian().double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-4)


def test_linears_with_one_input_share_a_hessian() -> None:
    found, _ = capture("llama", batches())
    assert found.by_input() == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert found.hessians.keys() == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}


def test_experts_that_no_token_reaches_have_no_hessian() -> None:
    found, seen = capture("mixtral", batches(((1, 1),)))  # one token chooses two of four experts
    reached = {name for name, xs in seen.items() if xs and xs[0].numel()}
    experts = {name for name in seen if ".experts." in name}
    assert len(experts & reached) == 4
    assert experts & found.hessians.keys() == experts & reached
    assert experts & found.leader.keys() == experts & reached
    # They stand alone: sharing what nobody saw would be an accident.
    assert all([name] in found.by_input() for name in experts - reached)
