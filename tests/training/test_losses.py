"""Losses against plain autograd of their definitions, in several pieces."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from signbit.training import losses
from signbit.training.losses import cross_entropies, distillation, hidden_distance
from signbit.training.options import TrainingOptions
from signbit.training.states import States

VOCABULARY, WIDTH = 11, 5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", 4)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def capped(weight: Tensor) -> losses.HeadLike:
    return lambda hidden: torch.tanh(hidden @ weight.T / 3) * 3


@pytest.mark.parametrize(("kl", "hidden", "lm"), [(0.7, 2.0, 0.3), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2.0, 0, 0.5)])
def test_value_and_gradient(kl: float, hidden: float, lm: float) -> None:
    """As by the formulas, for a head that is not linear."""
    head, teacher_head = capped(draw(VOCABULARY, WIDTH, seed=1)), capped(draw(VOCABULARY, WIDTH, seed=2))
    ids = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    teacher = States([draw(2, 7, WIDTH, seed=4), draw(2, 7, WIDTH, seed=5)], draw(2, 7, WIDTH, seed=6))
    inputs = [draw(2, 7, WIDTH, seed=seed).requires_grad_() for seed in (7, 8, 9)]
    options = TrainingOptions(kl=kl, hidden=hidden, lm=lm)
    found = distillation(options, States(inputs[:2], inputs[2]), teacher, ids, head, teacher_head)

    assert teacher.last is not None
    log_p, log_q = teacher_head(teacher.last).log_softmax(-1), head(inputs[2]).log_softmax(-1)
    wanted = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "lm": -log_q[:, :-1].gather(2, ids[:, 1:, None]).mean(),
        "hidden": torch.stack(
            [
                (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1).mean()
                for s, t in zip(inputs, teacher.hidden, strict=False)
            ]
        ).sum(),
    }
    weights = {name: weight for name, weight in (("kl", kl), ("lm", lm), ("hidden", hidden)) if weight}
    assert found.terms.keys() == weights.keys()
    for name, term in found.terms.items():
        torch.testing.assert_close(term, wanted[name].detach())
        assert not term.requires_grad
    total = torch.stack([weight * wanted[name] for name, weight in weights.items()]).sum()
    torch.testing.assert_close(found.total, total)
    used = [x for x, there in zip(inputs, (hidden, hidden, kl or lm), strict=True) if there]
    gradients = torch.autograd.grad(3 * found.total, used)
    for gradient, expected in zip(gradients, torch.autograd.grad(3 * total, used), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_weights_do_not_depend_on_length_or_batch() -> None:
    head = capped(draw(VOCABULARY, WIDTH, seed=1))
    student, teacher, ids = draw(1, 6, WIDTH, seed=2), draw(1, 6, WIDTH, seed=3), torch.arange(6).view(1, 6)
    values = []
    for times in ((1, 1, 1), (3, 1, 1)):
        states = [States([x.repeat(times)], x.repeat(times)) for x in (student, teacher)]
        found = distillation(TrainingOptions(lm=1.0), states[0], states[1], ids.repeat(times[:2]), head, head)
        values.append(found.total)
    torch.testing.assert_close(*values)


def test_no_head_is_asked_for_without_a_weight() -> None:
    states = States([draw(1, 6, WIDTH, seed=2)], None)
    found = distillation(TrainingOptions(kl=0, lm=0), states, states, torch.zeros(1, 6, dtype=torch.long), None, None)
    assert found.terms.keys() == {"hidden"}
    assert float(found.total) == pytest.approx(0, abs=1e-6)


def test_a_state_of_zero_has_no_direction() -> None:
    student = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    distance = hidden_distance(student, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    distance.backward()
    assert float(distance.detach()) == pytest.approx((1 + (0.6**2 + 0.2**2)) / 2)
    assert student.grad is not None
    assert torch.equal(student.grad[0], torch.zeros(2))


def test_cross_entropies_are_of_each_window() -> None:
    weight = draw(VOCABULARY, WIDTH, seed=1)
    last, ids = draw(3, 9, WIDTH, seed=2), torch.randint(VOCABULARY, (3, 9))
    wanted = [F.cross_entropy((states @ weight.T)[:-1], window[1:]) for states, window in zip(last, ids, strict=True)]
    torch.testing.assert_close(cross_entropies(last, ids, lambda h: h @ weight.T).float(), torch.stack(wanted))
