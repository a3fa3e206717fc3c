"""One layer of several packed matrices, loaded as vLLM loads: tensor by tensor, with the shard each belongs to."""

import subprocess
import sys

import pytest
import torch

from matrices import random_inputs, random_weight
from signbit import SignbitError
from signbit.integrations import vllm
from signbit.integrations.vllm.shards import Description, Shards
from signbit.layouts import Integers, Layout, SignPlanes


def packed() -> list[Layout]:
    """Of different layouts, with different scales, one with a bias correction."""
    generator = torch.Generator().manual_seed(0)
    negative = torch.rand(1, 12, 40, generator=generator) < 0.5
    signs = SignPlanes.encode(negative, torch.rand(1, 12, 1, generator=generator).half(), None, 0)
    codes = torch.randint(0, 16, (8, 40), generator=generator, dtype=torch.uint8)
    integers = Integers.encode(codes, torch.rand(8, 1, generator=generator).half(), None, 4, 0)
    return [signs, integers.with_bias(random_weight(1, 8)[0]), integers]


def described(layouts: list[Layout]) -> list[Description]:
    return [(f"m.{name}_proj", type(layout), layout.spec) for name, layout in zip("qkv", layouts, strict=True)]


def load(shards: Shards, layouts: list[Layout]) -> None:
    parameters = dict(shards.named_parameters())
    for shard, layout in zip("qkv", layouts, strict=True):
        for key, tensor in layout.state_dict().items():
            parameters[key].weight_loader(parameters[key], tensor, shard)  # type: ignore[attr-defined]


def test_products_side_by_side() -> None:
    layouts = packed()
    shards = Shards(described(layouts))
    assert {name for name, _ in shards.named_parameters()} == {"signs", "scales", "codes", "bias"}
    load(shards, layouts)
    shards.finish()
    assert not list(shards.parameters())
    x = random_inputs(5, 40)
    expected = torch.cat([x @ layout.dequantize().T for layout in layouts], -1)
    expected[:, 12:20] += layouts[1].get_buffer("bias").float()
    assert torch.allclose(shards(x), expected, atol=1e-5)


def test_one_matrix_needs_no_shard() -> None:
    layout = packed()[0]
    shards = Shards([("m.down_proj", type(layout), layout.spec)])
    for key, parameter in list(shards.named_parameters()):
        parameter.weight_loader(parameter, layout.get_buffer(key))  # type: ignore[attr-defined]
    shards.finish()
    assert torch.equal(shards.layouts[0].dequantize(), layout.dequantize())  # type: ignore[operator]


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    layouts = packed()
    shards = Shards(described(layouts))
    load(shards, layouts)
    scales = shards.get_parameter("scales")
    with pytest.raises(SignbitError, match="7 is none of its 3 shards"):
        scales.weight_loader(scales, layouts[0].get_buffer("scales"), 7)  # type: ignore[attr-defined]
    scales.weight_loader(scales, torch.ones(2, 2), "v")  # type: ignore[attr-defined]
    with pytest.raises(SignbitError, match=r"m\.v_proj\.packed\.scales is torch\.float32 \[2, 2\]"):
        shards.finish()
    with pytest.raises(SignbitError, match=r"lacks the tensor m\.q_proj\.packed\.signs"):
        Shards(described(layouts)).finish()


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SignbitError, match="vLLM is not installed"):
        vllm.register()


def test_importing_signbit_imports_no_plug_in() -> None:
    code = "import signbit, sys; assert not [m for m in sys.modules if m.startswith(('signbit.integrations', 'vllm'))]"
    subprocess.run([sys.executable, "-c", code], check=True)
