"""Sensitivities: what they predict of small errors is what small errors do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from signbit.budget.sensitivity import sensitivities

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", NAMES)
def test_noise_costs_what_the_sensitivity_says(name: str, tiny_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, 300, (64, 24), generator=generator)
    linears: dict[str, nn.Module] = {one: model.get_submodule(one) for one in NAMES}
    found = sensitivities(model, linears, windows, seed=1)[name]
    energy = 1e-3

    def disturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
        size = (output.square().sum() / output.numel()).sqrt()
        return output + energy**0.5 * size * torch.randn(output.shape, generator=generator)

    with torch.no_grad():
        clean = model(windows).logits.log_softmax(-1)
        handle = linears[name].register_forward_hook(disturb)
        divergences = []
        for _ in range(4):
            disturbed = model(windows).logits.log_softmax(-1)
            divergences.append(float((clean.exp() * (clean - disturbed)).sum(-1).mean()))
        handle.remove()
    assert energy * found == pytest.approx(sum(divergences) / 4, rel=0.15)


def test_it_depends_on_the_seed_alone_and_leaves_no_trace(tiny_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    linears: dict[str, nn.Module] = {one: model.get_submodule(one) for one in NAMES}
    windows = torch.arange(48).view(2, 24) + 3
    first, again = (sensitivities(model, linears, windows, seed=1) for _ in range(2))
    assert first == again and all(value > 0 for value in first.values())
    assert not any(linear._forward_hooks for linear in linears.values())
    assert all(parameter.grad is None for parameter in model.parameters())
