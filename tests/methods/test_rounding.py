import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from choosing import Rounding, random_rounding
from kernels.test_cpu import isa, needs_kernels  # noqa: F401
from signbit.kernels import cpu
from signbit.methods import rounding
from signbit.methods.rounding import Choices, round_in_turn

FLAGS = [
    dict(zip(("even", "each_weight", "shares", "before"), on, strict=True))
    for on in itertools.product((False, True), repeat=4)
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_reference_takes_the_nearest_in_turn(flags: dict[str, bool]) -> None:
    for n, k in [(1, 1), (7, 5), (33, 128)]:
        case = random_rounding(n, k, **flags)
        case.run(rounding.reference)
        case.check()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_kernels_take_the_nearest_in_turn(isa: str, flags: dict[str, bool]) -> None:  # noqa: F811
    for n, k in [(1, 1), (31, 2), (32, 7), (100, 128)]:
        case = random_rounding(n, k, **flags)
        case.run(cpu.round_in_turn)
        case.check()


@needs_kernels
@pytest.mark.parametrize("even", [False, True])
def test_all_instruction_sets_and_numbers_of_threads_choose_alike(even: bool) -> None:
    found: list[Rounding] = []
    before, threads = cpu.instruction_set(), torch.get_num_threads()
    assert before is not None
    try:
        for name, count in itertools.product(cpu.instruction_sets(), (1, 2)):
            cpu.use(name)
            torch.set_num_threads(count)
            found.append(random_rounding(150, 100, even=even, each_weight=True))
            found[-1].run(cpu.round_in_turn)
    finally:
        cpu.use(before)
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert torch.equal(one.places, found[0].places) and torch.equal(one.changes, found[0].changes)


IMPLEMENTATIONS = [
    pytest.param(rounding.reference, id="reference"),
    pytest.param(cpu.round_in_turn, id="C++", marks=needs_kernels),
]


@pytest.mark.parametrize("round_columns", IMPLEMENTATIONS)
@pytest.mark.parametrize("even", [False, True])
def test_targets_that_are_no_numbers_get_some_value(round_columns: Callable[..., object], even: bool) -> None:
    """What diverges must not read what is not there."""
    case = random_rounding(3, 4, even=even, shares=False)
    case.targets[0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    case.run(round_columns)
    assert (case.places < case.choices.counts[case.choices.which]).all()
    if even:
        last = int(case.choices.counts[case.choices.which[0, 0]]) - 1
        assert case.places[0].tolist() == [0, last, 0]


@pytest.mark.parametrize("round_columns", IMPLEMENTATIONS)
def test_values_all_alike_are_told_apart_by_the_side(round_columns: Callable[..., object]) -> None:
    case = random_rounding(3, 1, even=True, shares=False)
    case.choices = Choices.of_steps([torch.full((3,), 0.5)], [torch.zeros(3)], [8], torch.zeros(1, 1))
    case.targets = torch.tensor([[0.25, 0.5, 2.0]])
    case.run(round_columns)
    assert case.places.tolist() == [[3, 4, 4]]


@dataclass
class Recorded:
    """Any values, and the places that were chosen."""

    values: Tensor
    columns: int
    places: list[Tensor] = field(default_factory=list)

    def choices(self) -> Choices:
        return Choices.among([self.values], torch.zeros(self.columns, 1))

    def choose(self, places: Tensor) -> None:
        self.places.append(places)


@pytest.mark.parametrize("before", [False, True])
def test_more_columns_than_a_kernel_takes(before: bool) -> None:
    n, k = 5, 2 * rounding.TURNS + 41
    case = random_rounding(n, k, before=before)
    values = case.choices.tables[2]
    code = Recorded(values, k)
    case.choices = code.choices()
    case.changes = round_in_turn(code, case.targets.clone(), case.shares, case.before)
    (case.places,) = code.places
    case.check()


def test_tables_of_different_sizes() -> None:
    choices = Choices.among([torch.ones(2, 3), torch.ones(4, 3)], torch.tensor([[0], [1], [1]]))
    assert choices.tables.shape == (2, 4, 3) and choices.counts.tolist() == [2, 4]
    assert choices.which.shape == (3, 1) and choices.which.dtype == torch.int32


@pytest.mark.parametrize("round_columns", IMPLEMENTATIONS)
def test_of_values_alike_a_target_below_them_gets_the_last(round_columns: Callable[..., object]) -> None:
    """So signs of a scale of 0 are those of what is left."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0]).unsqueeze(1)
    case = random_rounding(5, 1, shares=False)
    case.choices = Choices.among([signs.expand(6, 5)], torch.zeros(1, 1))
    case.targets = torch.tensor([[1.5, 0.75, -1.5, -0.75, 0.0]])
    case.run(round_columns)
    assert case.places.tolist() == [[0, 2, 3, 1, 4]]


def test_other_dtypes_are_refused() -> None:
    code = Recorded(torch.ones(2, 3), 4)
    with pytest.raises(TypeError, match="in float32"):
        round_in_turn(code, torch.ones(4, 3, dtype=torch.float64))
