import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import signbit
from matrices import half, random_weight
from signbit import SignbitError
from signbit.layouts import Layout
from signbit.methods import onebit
from signbit.methods.onebit import OneBitOptions
from signbit.methods.svid import svid
from signbit.modules import QuantizedLinear
from signbit.recipe import Recipe
from tiny import VOCAB

MakeDir = Callable[..., Path]


def quantize(weight: Tensor, **options: Any) -> Layout:
    return onebit.quantize(weight, None, OneBitOptions(**options))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_matrix_is_signs_times_the_vectors(norm: bool, dtype: str) -> None:
    weight = random_weight(20, 70)
    weight[:, 5] = 0
    layout = quantize(weight, norm=norm, scale_dtype=dtype)
    assert layout.spec.norm == norm
    a, c = (part.to(getattr(torch, dtype)).double() for part in svid(weight))
    wanted = torch.where(weight < 0, -1.0, 1.0) * torch.outer(a, c)
    assert torch.allclose(layout.dequantize().double(), wanted, rtol=1e-6)


@pytest.mark.parametrize("own", [False, True])
def test_the_linear_is_equation_3(own: bool) -> None:
    weight, x = random_weight(20, 70), torch.randn(2, 3, 70)
    bias = torch.randn(20) if own else None
    h, g = (half(part).float() for part in svid(weight))
    product = ((x * g) @ torch.where(weight < 0, -1.0, 1.0).T) * h
    wanted = F.layer_norm(product, (20,), eps=1e-5)
    wanted = wanted if bias is None else wanted + bias
    assert torch.allclose(QuantizedLinear(quantize(weight), bias)(x), wanted, rtol=1e-3, atol=1e-4)
    assert torch.allclose(QuantizedLinear(quantize(weight, norm=False))(x), product, rtol=1e-3, atol=1e-4)


def test_bits() -> None:
    layout = quantize(torch.randn(512, 1024))
    assert layout.items() == {"signs": 512 * 1024 // 8, "scales": 2 * (512 + 1024)}
    assert layout.nominal_bits == 1


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
def test_small_weights_survive_float16(size: float) -> None:
    weight = random_weight(20, 70)
    one, small = quantize(weight).dequantize(), quantize(size * weight).dequantize()
    assert torch.allclose(small / size, one, rtol=0.01, atol=1e-6)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not quantize(torch.zeros(4, 40)).dequantize().any()


def test_one_output_is_not_normalised() -> None:
    """It would be 0 whatever comes in."""
    weight = random_weight(1, 64)
    layout = quantize(weight)
    assert not layout.spec.norm
    assert QuantizedLinear(layout)(torch.randn(5, 64)).abs().min() > 0
    assert quantize(random_weight(2, 64)).spec.norm


@pytest.mark.parametrize(("key", "value"), [("group_size", 128), ("mean", True)])
def test_options_that_the_paper_does_not_have_are_refused(key: str, value: Any) -> None:
    with pytest.raises(SignbitError, match=key):
        Recipe({"method": "onebit", key: value})


def test_a_bias_correction_does_not_go_with_a_norm() -> None:
    with pytest.raises(SignbitError, match=r"bias_correction.*norm.*false"):
        quantize(random_weight(4, 40)).with_bias(torch.zeros(4))
    assert signbit.Recipe({"method": "onebit", "norm": False, "bias_correction": True})


class Normalised(nn.Module):
    """A dense linear with OneBit's norm, as the paper's equation 3 has it."""

    def __init__(self, dense: nn.Linear, layout: Layout) -> None:
        super().__init__()
        self.dense, self.matrix = dense, layout.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x @ self.matrix.T, (len(self.matrix),))
        return y if self.dense.bias is None else y + self.dense.bias


@torch.no_grad()
def test_a_checkpoint_with_norms(tiny_dir: MakeDir, packed_dir: MakeDir, tmp_path: Path) -> None:
    """Loaded, it computes equation 3; saved again, it is the same."""
    packed = packed_dir("qwen2", method="onebit", group_size=0, samples=0)
    layers = json.loads((packed / "config.json").read_text())["quantization_config"]["layers"]
    assert layers and all(layer["norm"] for layer in layers.values())
    model, _ = signbit.load(packed)
    dense = AutoModelForCausalLM.from_pretrained(tiny_dir("qwen2"), dtype=torch.float32).eval()
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        layout = model.get_submodule(name).packed
        setattr(dense.get_submodule(parent), leaf, Normalised(dense.get_submodule(name), layout))
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["layers"] == layers
    found = signbit.inspect(packed)
    assert found["nominal_bits_per_weight"] == 1
    assert found["items"].keys() == {"signs", "scales"}
