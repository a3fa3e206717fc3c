"""``bias_correction``: the mean of what quantizing changes is put right by a stored bias, counted with the weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import signbit
from matrices import hessian_of, random_inputs, random_weight
from signbit import Recipe, SignbitError
from signbit.blockwise.linears import layer_errors
from signbit.calibration.hessian import HessianAccumulator, centered, factorize
from signbit.layouts import SignPlanes, describe, parse_spec
from signbit.methods import sign
from signbit.methods.sign import SignOptions
from signbit.modules import QuantizedLinear
from stored import unpadded
from tiny import SMALL_RECIPE

MakeDir = Callable[..., Path]


def packed(weight: Tensor) -> SignPlanes:
    return sign.quantize(weight, None, SignOptions())


def test_a_layout_with_a_bias_is_described_stored_and_counted() -> None:
    weight = random_weight(6, 40)
    plain = packed(weight)
    layout = plain.with_bias(torch.arange(6.0))
    kind, spec = parse_spec("m", json.loads(json.dumps(describe(layout))))
    assert (kind, spec) == (SignPlanes, layout.spec) and spec.bias
    assert "bias" not in describe(plain)
    again = kind(spec, dict(layout.state_dict()))
    assert torch.equal(again.get_buffer("bias").float(), torch.arange(6.0))
    assert torch.equal(again.dequantize(), plain.dequantize())
    assert layout.items() == plain.items() | {"bias": 12}
    assert sum(layout.items().values()) == sum(tensor.nbytes for tensor in layout.state_dict().values())


@pytest.mark.parametrize("own", [False, True])
def test_the_bias_is_added_to_the_product(own: bool) -> None:
    layout, x = packed(random_weight(6, 40)), torch.randn(3, 40)
    bias = torch.randn(6) if own else None
    without = QuantizedLinear(layout, bias)(x)
    assert torch.allclose(QuantizedLinear(layout.with_bias(torch.ones(6)), bias)(x), without + 1, atol=1e-5)
    assert QuantizedLinear(layout.with_bias(torch.ones(6)), bias).half()(x.half()).dtype == torch.float16


def test_layer_errors_are_those_of_the_corrected_outputs() -> None:
    weight, inputs = random_weight(6, 40), random_inputs(500, 40) + torch.linspace(-2, 3, 40)
    quantized = packed(weight).dequantize()
    accumulator = HessianAccumulator(40, inputs.device)
    for batch in inputs.split(128):
        accumulator.add(batch)
    mean = accumulator.mean()
    assert torch.allclose(mean, inputs.mean(0), atol=1e-5)
    centered = accumulator.hessian() - 2 * torch.outer(mean, mean)
    wanted, got = inputs @ weight.T, inputs @ quantized.T + (weight - quantized) @ mean
    expected = float((wanted - got).square().sum() / wanted.square().sum())
    assert layer_errors(weight, quantized, centered, mean)[1] == pytest.approx(expected, rel=1e-3)
    # By another correction than the mean's own.
    correction = torch.linspace(-0.1, 0.2, 6)
    got = inputs @ quantized.T + correction
    expected_then = float((wanted - got).square().sum() / wanted.square().sum())
    assert layer_errors(weight, quantized, centered, mean, correction)[1] == pytest.approx(expected_then, rel=1e-3)
    uncorrected = float((wanted - inputs @ quantized.T).square().sum() / wanted.square().sum())
    assert layer_errors(weight, quantized, hessian_of(inputs))[1] == pytest.approx(uncorrected, rel=1e-3)
    assert expected < 0.8 * uncorrected


def test_the_hessian_of_what_varies() -> None:
    inputs = random_inputs(300, 20) + 5
    accumulator = HessianAccumulator(20, inputs.device)
    accumulator.add(inputs)
    found = centered(accumulator.hessian(), accumulator.mean())
    assert torch.allclose(found, hessian_of(inputs - inputs.mean(0)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 160])
@pytest.mark.parametrize("width", [60, 64, 100])
def test_inputs_that_do_not_vary_at_all(tokens: int, width: int) -> None:
    """An expert that one token reached: its weights are quantized as they are, none is given up."""
    accumulator = HessianAccumulator(width, torch.device("cpu"))
    accumulator.add(random_inputs(1, width).expand(tokens, -1))
    factor = factorize(centered(accumulator.hessian(), accumulator.mean()), 0.01)
    assert factor.damping == 0.01 and not factor.dead.any()


def test_a_constant_input_keeps_its_weights() -> None:
    inputs = random_inputs(200, 10)
    inputs[:, :3] = 2.0
    inputs[:, 7] = 0.0
    accumulator = HessianAccumulator(10, inputs.device)
    accumulator.add(inputs)
    factor = factorize(centered(accumulator.hessian(), accumulator.mean()), 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [7]


def test_an_expert_that_one_token_reached(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    fields = {**SMALL_RECIPE, "calib": str(text_file), "samples": 1, "seqlen": 2}
    recipe = Recipe.load("billm-plus", {key: value for key, value in fields.items() if key != "method"})
    report = signbit.quantize(str(tiny_dir("mixtral")), tmp_path / "out", recipe, device="cpu")
    assert all(layer.weight_error < 2 for layer in report.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_moe"])
def test_through_the_whole_pipeline(family: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    fields = {**SMALL_RECIPE, "calib": str(text_file), "method": "xnor"}
    model = str(tiny_dir(family))
    plain = signbit.quantize(model, tmp_path / "plain", Recipe(fields), device="cpu")
    fields["bias_correction"] = True
    corrected = signbit.quantize(model, tmp_path / "corrected", Recipe(fields), device="cpu")
    first = {layer.name: layer.output_error for layer in plain.layers}
    # Later layers see other inputs; where both see the same, the correction can only help.
    same = [layer for layer in corrected.layers if ".0." in layer.name][:1]
    assert all(layer.output_error < first[layer.name] * 1.02 for layer in same)  # type: ignore[operator]
    found = signbit.inspect(tmp_path / "corrected")
    assert found["items"]["bias"] == 2 * sum(layer["shape"][0] for layer in found["layers"])
    assert sum(found["items"].values()) == found["bytes"]["quantized"]
    loaded, _ = signbit.load(tmp_path / "corrected")
    loaded.save_pretrained(tmp_path / "again")
    tensors = {file.parent.name: unpadded(file.read_bytes()) for file in tmp_path.glob("*/model.safetensors")}
    assert tensors["corrected"] == tensors["again"]


def test_needs_calibration() -> None:
    with pytest.raises(SignbitError, match="bias_correction needs calibration"):
        Recipe({"method": "sign", "samples": 0, "bias_correction": True})
