from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from matrices import damped, hessian_of, random_factor, random_inputs, random_weight
from signbit.calibration.hessian import Factor, factorize
from signbit.methods import rounding
from signbit.methods.options import Feedback, SweepOptions
from signbit.methods.rounding import Choices
from signbit.methods.sweep import sweep


@dataclass
class Signs:
    """The simplest code: one scale a row, frozen, and signs that may be chosen anew."""

    scale: Tensor
    signs: Tensor

    def values(self) -> Tensor:
        return self.scale.unsqueeze(1) * self.signs

    def choices(self) -> Choices:
        return Choices.among([torch.stack([self.scale, -self.scale])], torch.zeros(self.signs.shape[1], 1))

    def choose(self, places: Tensor) -> None:
        self.signs = 1 - 2 * places.T.float()


class Recorder:
    """Quantizes groups and keeps what it was given."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.columns: list[slice] = []

    def __call__(self, weight: Tensor, columns: slice) -> Signs:
        self.weights.append(weight.clone())
        self.columns.append(columns)
        return Signs(weight.abs().mean(1), torch.where(weight < 0, -1.0, 1.0))


def run(weight: Tensor, factor: Factor | None, size: int, feedback: Feedback) -> tuple[Recorder, Tensor]:
    """The recorder, and the quantized matrix."""
    recorder = Recorder()
    codes = sweep(weight, factor, size, recorder, SweepOptions(feedback=feedback))
    return recorder, torch.cat([code.values() for code in codes], dim=1)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 8, 30])
def test_block_feedback_is_the_best_there_is(size: int) -> None:
    """After each group, the columns still to come are the least-squares optimum for what was fixed so far."""
    weight, factor = random_weight(5, 30), random_factor(30)
    hessian = damped(factor)
    recorder, quantized = run(weight, factor, size, "block")
    for seen, columns in zip(recorder.weights, recorder.columns, strict=True):
        stop = columns.start
        # Minimise tr(D H D^T) over the columns from stop on: D_rest H_rest,rest = -D_fixed H_fixed,rest.
        fixed = (quantized - weight)[:, :stop].double()
        free = torch.linalg.solve(hessian[stop:, stop:], -(fixed @ hessian[:stop, stop:]).T).T
        assert close(seen, (weight[:, stop:] + free)[:, : seen.shape[1]])


@pytest.mark.parametrize("size", [7, 16, 0])
@pytest.mark.parametrize("turns", [5, 128])
def test_column_feedback_is_gptq(monkeypatch: pytest.MonkeyPatch, size: int, turns: int) -> None:
    """Against the textbook loop: one column at a time, its error passed on to all columns after it at once."""
    monkeypatch.setattr(rounding, "TURNS", turns)
    weight, factor = random_weight(6, 33), random_factor(33)
    recorder, quantized = run(weight, factor, size, "column")
    inverse = torch.linalg.inv(damped(factor))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    work, expected = weight.clone(), torch.zeros_like(weight)
    for start in range(0, 33, size or 33):
        stop = min(start + (size or 33), 33)
        assert close(recorder.weights[start // (size or 33)], work[:, start:stop])
        scale = work[:, start:stop].abs().mean(1)
        for j in range(start, stop):
            expected[:, j] = torch.where(work[:, j] < 0, -scale, scale)
            error = (work[:, j] - expected[:, j]) / upper[j, j]
            work[:, j + 1 :] -= error.unsqueeze(1) * upper[j, j + 1 :]
    assert close(quantized, expected)


def test_groups_wider_than_what_a_kernel_takes() -> None:
    width = 2 * rounding.TURNS + 41
    weight, factor = random_weight(3, width), random_factor(width)
    _, quantized = run(weight, factor, 0, "column")
    work = weight.double()
    upper = factor.upper().double()
    scale = work.abs().mean(1)
    different = 0
    for j in range(width):
        value = torch.where(work[:, j] < 0, -scale, scale)
        # Rounding may turn a sign that hangs on nothing; then follow the sweep, as all later columns depend on it.
        turned = (value * quantized[:, j] < 0) & (work[:, j].abs() > 1e-4)
        different += int(turned.sum())
        work[:, j + 1 :] -= ((work[:, j] - quantized[:, j]) / upper[j, j]).unsqueeze(1) * upper[j, j + 1 :]
    assert different == 0


@pytest.mark.parametrize("size", [1, 8])
def test_diagonal_feedback(size: int) -> None:
    weight, factor = random_weight(5, 30), random_factor(30)
    recorder, quantized = run(weight, factor, size, "diagonal")
    work, upper = weight.clone(), factor.upper()
    for seen, columns in zip(recorder.weights, recorder.columns, strict=True):
        assert close(seen, work[:, columns])
        for j in range(columns.start, columns.stop):
            error = (work[:, j] - quantized[:, j]) / upper[j, j]
            work[:, columns.stop :] -= error.unsqueeze(1) * upper[j, columns.stop :]


def test_with_one_column_a_group_all_feedback_is_gptq() -> None:
    weight, factor = random_weight(5, 20), random_factor(20)
    results = [run(weight, factor, 1, feedback)[1] for feedback in ("diagonal", "block", "column")]
    assert close(results[0], results[1]) and close(results[1], results[2])


@pytest.mark.parametrize(("factor", "feedback"), [(random_factor(20), "none"), (None, "none"), (None, "column")])
def test_without_feedback_or_hessian_groups_are_taken_as_they_are(factor: Factor | None, feedback: Feedback) -> None:
    weight = random_weight(5, 20)
    recorder, _ = run(weight, factor, 8, feedback)
    assert torch.equal(torch.cat(recorder.weights, dim=1), weight)


@pytest.mark.parametrize(
    ("size", "starts"), [(8, [0, 8, 16]), (0, [0]), (20, [0]), (19, [0, 19]), (64, [0]), (1, list(range(20)))]
)
def test_groups(size: int, starts: list[int]) -> None:
    recorder, _ = run(random_weight(2, 20), random_factor(20), size, "block")
    assert [columns.start for columns in recorder.columns] == starts
    assert [columns.stop for columns in recorder.columns] == [*starts[1:], 20]
    assert [seen.shape[1] for seen in recorder.weights] == [c.stop - c.start for c in recorder.columns]


@pytest.mark.parametrize("feedback", ["none", "diagonal", "block", "column"])
def test_weights_of_dead_columns_are_zeroed_and_get_no_feedback(feedback: Feedback) -> None:
    inputs = random_inputs(100, 20)
    inputs[:, [3, 17]] = 0
    weight = random_weight(4, 20)
    before = weight.clone()
    recorder, _ = run(weight, factorize(hessian_of(inputs), 0.01), 8, feedback)
    assert not torch.cat(recorder.weights, dim=1)[:, [3, 17]].any()
    assert torch.equal(weight, before)


def test_the_more_exact_the_feedback_the_less_the_error() -> None:
    """On average over matrices; of the output, which is what the sweep is about."""
    hessian = hessian_of(random_inputs(400, 96))
    factor = factorize(hessian, 0.01)

    def error(feedback: Feedback) -> float:
        total = 0.0
        for seed in range(5):
            weight = random_weight(8, 96, seed)
            difference = run(weight, factor, 16, feedback)[1] - weight
            total += float(((difference @ hessian) * difference).sum())
        return total

    assert error("column") < error("block") < error("none")


def test_is_a_pure_function() -> None:
    weight, factor = random_weight(4, 20), random_factor(20)
    copies = [tensor.clone() for tensor in (weight, factor.root)]
    first, second = (run(weight, factor, 8, "column")[1] for _ in range(2))
    assert torch.equal(first, second)
    for tensor, copy in zip((weight, factor.root), copies, strict=True):
        assert torch.equal(tensor, copy)
