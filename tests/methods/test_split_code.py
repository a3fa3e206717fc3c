from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from choosing import choose_column
from matrices import random_weight
from signbit.methods.arb_llm import ArbLLMOptions, quantize_group
from signbit.methods.split_code import SplitCode, nearest_pair, pack

KINDS = ["mean", "mean bitmap", "", "bitmap", "columns", "columns bitmap"]


def group_code(kind: str, n: int = 60, k: int = 24, max_salient: int = 49) -> SplitCode:
    """A code with ordinary and with salient columns, and residual scales that are the larger in every second row."""
    weight = random_weight(n, k)
    weight[:, 3::11] *= 3
    options = ArbLLMOptions(
        variant="rc" if "columns" in kind else "plain",
        mean="mean" in kind,
        bitmap="bitmap" in kind,
        column_search="weights",
        max_salient=max_salient,
    )
    code = quantize_group(weight, torch.ones(k), None, options)
    if max_salient:
        code.salient_scales[..., ::2, :] = code.salient_scales[..., ::2, :].sort(dim=1).values
    return code


def choices(code: SplitCode, column: int) -> Tensor:
    """All values [V, n] that weights of a column can have, found by setting every bit."""

    def all_bits() -> Iterator[Tensor]:
        for bits in range(8):
            code.negative[:, column], code.residual[:, column] = bool(bits & 1), bool(bits & 2)
            code.sparse[:, column] = bool(bits & 4) and bool(code.bitmap or not code.salient[column])
            yield code.values()[:, column]

    return torch.stack(list(all_bits()))


@pytest.mark.parametrize("kind", KINDS)
def test_reassigned_weights_get_the_nearest_value(kind: str) -> None:
    code = group_code(kind)
    first, second = code.salient_scales[0]
    assert (second > first).any() and (second < first).any()
    assert 0 < code.salient.sum() < 24
    for column in range(24):
        drifted = torch.randn(60, generator=torch.Generator().manual_seed(column))
        nearest = (choices(code, column) - drifted).abs().amin(0)
        found = choose_column(code, column, drifted)
        assert torch.allclose((found - drifted).abs(), nearest, atol=1e-5)


@pytest.mark.parametrize("max_salient", [0, 49])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_sum_of_coefficients_times_features(kind: str, max_salient: int) -> None:
    code = group_code(kind, max_salient=max_salient)
    features = code.features()
    assert features.shape == (len(code.coefficients), 60, 24)
    found = (code.coefficients.unsqueeze(2) * features).sum(0)
    assert torch.allclose(found, code.values(), atol=1e-5)
    doubled = 2 * code.values()
    code.set_coefficients(2 * code.coefficients)
    assert torch.equal(code.values(), doubled)


def test_scales_are_stored_by_their_size_and_rounded() -> None:
    code = group_code("mean bitmap")
    wanted = -code.coefficients * 1.0001
    before = wanted.clone()
    code.set_coefficients(wanted)
    assert torch.equal(wanted, before)
    rounded = wanted.half().float()
    assert torch.equal(code.coefficients, torch.cat([rounded[:6].abs(), rounded[6:]]))


@pytest.mark.parametrize("max_salient", [0, 49])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_nothing(kind: str, max_salient: int) -> None:
    codes = [group_code(kind, 7, k, limit) for k, limit in ((24, max_salient), (24, 0), (5, max_salient), (1, 0))]
    codes = [codes[0], codes[2]] if max_salient else codes[:2]
    values = torch.cat([code.values() for code in codes], dim=1)
    assert torch.equal(pack(codes, 24).dequantize(), values)


def test_nearest_pair() -> None:
    first, second = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([0.5, 3.0, 1.0, 0.0])
    for deviation in torch.linspace(-5, 5, 41):
        negative, residual, distance = nearest_pair(deviation.expand(4), first, second)
        values = first * (1 - 2 * negative.float()) + second * (1 - 2 * residual.float())
        every = torch.stack([a * first + b * second for a in (1, -1) for b in (1, -1)])
        assert torch.equal((deviation - values).abs(), (deviation - every).abs().amin(0))
        assert torch.equal(distance, (deviation - values).abs())
