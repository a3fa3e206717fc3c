from typing import Any, get_args

import pytest
import torch

from matrices import hessian_of, random_factor, random_inputs, random_weight
from signbit.calibration.hessian import factorize, quadratic
from signbit.layouts import SignPlanes
from signbit.methods import sign, xnor
from signbit.methods.options import Feedback
from signbit.methods.sign import PlanesCode, SignOptions
from signbit.methods.xnor import XnorOptions

FEEDBACKS = get_args(Feedback)


def quantize(weight: torch.Tensor, seed: int = 0, **options: Any) -> SignPlanes:
    return xnor.quantize(weight, random_factor(weight.shape[1], seed), XnorOptions(**options))


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch, feedback: Feedback, mean: bool, planes: int) -> None:
    fit, codes = PlanesCode.fit, []

    def recording(*arguments: Any) -> PlanesCode:
        codes.append(fit(*arguments))
        return codes[-1]

    monkeypatch.setattr(PlanesCode, "fit", recording)
    layout = quantize(random_weight(5, 70), feedback=feedback, group_size=32, mean=mean, planes=planes)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))


def test_without_feedback_it_is_plain_signs() -> None:
    weight = random_weight(5, 70)
    plain = sign.quantize(weight, None, SignOptions(group_size=32))
    assert torch.equal(quantize(weight, group_size=32, feedback="none").dequantize(), plain.dequantize())


@pytest.mark.parametrize("size", [0, 32])
def test_feedback_lowers_the_output_error(size: int) -> None:
    inputs = random_inputs(400, 96)
    hessian = hessian_of(inputs)
    factor = factorize(hessian, 0.01)

    def error(feedback: str) -> float:
        total = 0.0
        for seed in range(4):
            weight = random_weight(8, 96, seed)
            options = XnorOptions(group_size=size, feedback=feedback)
            total += quadratic(xnor.quantize(weight, factor, options).dequantize() - weight, hessian)
        return total

    assert error("column") < 0.95 * error("none")
    if size:
        assert error("block") < error("none")


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1)])
def test_what_signs_hold_exactly_stays_exact(shape: tuple[int, int], feedback: Feedback) -> None:
    """Constant rows, among them one of zeros."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    for options in ({}, {"mean": True}, {"group_size": 2}):
        assert torch.equal(quantize(rows, feedback=feedback, **options).dequantize(), rows)


def test_defaults_and_options_reach_the_layout() -> None:
    spec = quantize(random_weight(3, 300)).spec
    assert (spec.planes, spec.group_size, spec.mean, spec.scale_dtype) == (1, 128, False, "float16")
    spec = quantize(random_weight(3, 100), planes=2, mean=True, scale_dtype="bfloat16").spec
    assert (spec.planes, spec.group_size, spec.mean, spec.scale_dtype) == (2, 0, True, "bfloat16")
    assert not spec.column_scales
    assert quantize(random_weight(3, 100), column_scales=True).spec.column_scales


def test_deterministic() -> None:
    weight = random_weight(5, 70)
    before = weight.clone()
    first, second = (quantize(weight, group_size=16).state_dict() for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)
