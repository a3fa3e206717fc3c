from typing import Any

import pytest
import torch

from choosing import choose_column
from matrices import binarized, hessian_of, random_inputs, random_weight
from signbit.calibration.hessian import factorize
from signbit.layouts import SignPlanes
from signbit.methods import sign
from signbit.methods.sign import PlanesCode, SignOptions


def quantize(weight: torch.Tensor, **options: Any) -> SignPlanes:
    return sign.quantize(weight, None, SignOptions(**options))


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 16, 33])
def test_each_plane_binarizes_what_those_before_it_left(planes: int, size: int) -> None:
    weight = random_weight(5, 70)
    groups = [binarized(part, planes) for part in weight.split(size or 70, dim=1)]
    expected = torch.cat(groups, dim=1)
    # A residual near zero may get the other sign under rounded scales: compare rows, not weights.
    found = quantize(weight, planes=planes, group_size=size).dequantize()
    assert (found - weight).norm() == pytest.approx(float((expected - weight).norm()), rel=1e-3)
    assert ((found - expected).abs() > 2e-3).float().mean() < 0.01


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packing_changes_nothing(monkeypatch: pytest.MonkeyPatch, mean: bool, dtype: str) -> None:
    fit, codes = PlanesCode.fit, []

    def recording(*arguments: Any) -> PlanesCode:
        codes.append(fit(*arguments))
        return codes[-1]

    monkeypatch.setattr(PlanesCode, "fit", recording)
    layout = quantize(random_weight(5, 70), planes=3, group_size=32, mean=mean, scale_dtype=dtype)
    assert len(codes) == 3
    assert torch.equal(layout.dequantize(), torch.cat([code.values() for code in codes], dim=1))


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, {"planes": 1, "group_size": 0, "mean": False, "scale_dtype": "float16"}),
        ({"planes": 4}, {"planes": 4}),
        ({"group_size": 16}, {"group_size": 16}),
        ({"group_size": 70}, {"group_size": 0}),
        ({"group_size": 71}, {"group_size": 0}),
        ({"mean": True}, {"mean": True}),
        ({"scale_dtype": "bfloat16"}, {"scale_dtype": "bfloat16"}),
    ],
)
def test_options_reach_the_layout(options: dict[str, Any], spec: dict[str, Any]) -> None:
    found = quantize(random_weight(5, 70), **options).spec.to_dict()
    assert {key: found[key] for key in spec} == spec


def test_means_help_rows_that_are_off_center_and_planes_help_all() -> None:
    weight = random_weight(8, 70) + torch.linspace(-1, 1, 8).unsqueeze(1)

    def error(**options: Any) -> float:
        return float((quantize(weight, **options).dequantize() - weight).norm())

    assert error(mean=True) < 0.95 * error()
    assert error(planes=3) < error(planes=2) < error()
    assert error(group_size=16) < error()


def test_looks_at_no_data() -> None:
    weight = random_weight(5, 30)
    inputs = random_inputs(100, 30)
    inputs[:, 3] = 0
    with_factor = sign.quantize(weight, factorize(hessian_of(inputs), 0.01), SignOptions())
    assert torch.equal(with_factor.dequantize(), quantize(weight).dequantize())


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (1, 40), (4, 1), (1, 1)])
@pytest.mark.parametrize("size", [0, 2])
def test_what_signs_hold_exactly_stays_exact(shape: tuple[int, int], mean: bool, size: int) -> None:
    """Constant rows, among them one of zeros."""
    rows = torch.tensor([0.5, 0.0, -2.0, 3.0])[: shape[0]].unsqueeze(1).expand(shape).clone()
    assert torch.equal(quantize(rows, planes=2, mean=mean, group_size=size).dequantize(), rows)


def test_reassigned_weights_get_the_nearest_value_of_two_planes() -> None:
    """Where the second plane's scale is below the first's, going plane by plane finds it."""
    weight = random_weight(50, 40)
    code = PlanesCode.fit(weight, 2, True, torch.float16)
    assert (code.scales[1] < code.scales[0]).all()
    assert code.mean is not None
    drifted = weight[:, 7] + 0.5 * torch.randn(50, generator=torch.Generator().manual_seed(3))
    found = choose_column(code, 7, drifted)
    first, second = code.scales.float()
    choices = torch.stack([a * first + b * second for a in (1, -1) for b in (1, -1)]) + code.mean.float()
    nearest = (choices - drifted).abs().amin(0)
    assert torch.allclose((found - drifted).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("options", [{"planes": 0}, {"planes": 9}, {"group_size": -1}, {"feedback": "none"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SignOptions(**options)
