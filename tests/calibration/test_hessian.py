import pytest
import torch
from torch import Tensor

from matrices import hessian_of, random_inputs
from signbit.calibration.hessian import PANEL, HessianAccumulator, factorize, quadratic
from signbit.errors import SignbitError

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 100, PANEL, PANEL + 1, 2 * PANEL + 88])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hessian_is_the_mean_outer_product_of_all_batches(width: int, dtype: torch.dtype) -> None:
    x = random_inputs(90, width).to(dtype)
    accumulator = HessianAccumulator(width, CPU)
    for batch in (x[:60].view(3, 20, width), x[60:61], x[61:]):  # batches are not weighted equally, tokens are
        accumulator.add(batch)
    assert accumulator.tokens == 90
    hessian = accumulator.hessian()
    expected = 2 / 90 * x.double().T @ x.double()
    assert hessian.dtype == torch.float32
    assert torch.equal(hessian, hessian.T)
    assert (hessian - expected).abs().max() <= 1e-5 * expected.diagonal().max()


def test_no_tokens_give_zeros() -> None:
    accumulator = HessianAccumulator(5, CPU)
    assert torch.equal(accumulator.hessian(), torch.zeros(5, 5))
    accumulator.add(torch.zeros(2, 0, 5))
    assert torch.equal(accumulator.hessian(), torch.zeros(5, 5))


def test_asking_twice_and_adding_after_asking() -> None:
    x = random_inputs(20, 7)
    accumulator = HessianAccumulator(7, CPU)
    accumulator.add(x[:10])
    assert torch.equal(accumulator.hessian(), accumulator.hessian())
    accumulator.add(x[10:])
    assert torch.allclose(accumulator.hessian(), hessian_of(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 33, 300])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_factor(width: int, damping: float) -> None:
    hessian = hessian_of(random_inputs(4 * width, width))
    factor = factorize(hessian, damping)
    assert factor.damping == damping
    assert not factor.dead.any()
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(width)
    upper, inverse = factor.upper().double(), factor.root.double()
    assert torch.equal(upper, upper.triu())
    assert torch.equal(inverse, inverse.triu())
    assert (upper.diagonal() > 0).all()
    eye = torch.eye(width, dtype=torch.float64)
    tolerance = 1e-6 * float(torch.linalg.cond(damped))
    assert (upper.T @ upper @ damped - eye).abs().max() < tolerance
    assert (upper @ inverse - eye).abs().max() < tolerance
    assert torch.equal(factor.diagonal.double(), upper.diagonal())
    block = factor.upper(slice(width // 3, width)).double()
    assert (block - upper[width // 3 :, width // 3 :]).abs().max() < tolerance
    # What the sweep divides by: U_jj^2 is the first entry of the inverse Hessian of columns j..
    last = width // 2
    assert upper[last, last] ** 2 == pytest.approx(float(torch.linalg.inv(damped[last:, last:])[0, 0]), rel=1e-3)


def test_inputs_that_are_always_zero_are_dead_and_change_nothing_for_the_rest() -> None:
    x = random_inputs(200, 12)
    alive = [0, 1, 2, 4, 5, 7, 8, 9, 10]
    x[:, [3, 6, 11]] = 0
    hessian = hessian_of(x)
    before = hessian.clone()
    factor = factorize(hessian, 0.0)
    assert torch.equal(hessian, before)
    assert factor.dead.nonzero().flatten().tolist() == [3, 6, 11]
    assert torch.isfinite(factor.upper()).all()
    assert torch.allclose(factor.upper()[alive][:, alive], factorize(hessian[alive][:, alive], 0.0).upper(), atol=1e-5)
    assert not factor.root[3, 4:].any() and not factor.root[:3, 3].any()


def test_all_dead() -> None:
    factor = factorize(torch.zeros(4, 4), 0.01)
    assert factor.dead.all()
    assert torch.isfinite(factor.upper()).all()


@pytest.mark.parametrize("damping", [0.0, 1e-8])
def test_a_singular_hessian_gets_more_damping_and_says_so(damping: float) -> None:
    x = random_inputs(60, 30)
    x[:, 15:] = x[:, :15]  # rank 15
    hessian = hessian_of(x)
    factor = factorize(hessian, damping)
    assert factor.damping > damping
    steps = torch.tensor(factor.damping / (damping or 1e-5)).log10()
    assert steps == pytest.approx(round(float(steps)), abs=1e-3)  # by whole factors of ten
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(30)
    assert torch.allclose(factor.root @ factor.root.T, damped, rtol=1e-4, atol=1e-5)


def test_fewer_tokens_than_inputs_are_enough() -> None:
    factor = factorize(hessian_of(random_inputs(10, 64)), 0.01)
    assert factor.damping == 0.01
    assert torch.isfinite(factor.upper()).all()


@pytest.mark.parametrize(
    "hessian", [-100 * torch.eye(3), torch.full((3, 3), float("nan")), torch.tensor([[1.0, 99.0], [99.0, 1.0]])]
)
def test_a_hopeless_hessian_is_refused_with_advice(hessian: Tensor) -> None:
    with pytest.raises(SignbitError, match="calibration text"):
        factorize(hessian, 0.01)


@pytest.mark.parametrize("width", [1, 100, PANEL + 44, 2 * PANEL + 88])
def test_quadratic_is_the_trace_and_reads_the_lower_triangle_only(width: int) -> None:
    hessian = hessian_of(random_inputs(50, width))
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(1))
    expected = float(torch.trace(rows.double() @ hessian.double() @ rows.double().T))
    assert quadratic(rows, hessian) == pytest.approx(expected, rel=1e-5)


def test_quadratic_is_twice_the_mean_squared_output() -> None:
    x = random_inputs(50, 20)
    rows = torch.randn(9, 20, generator=torch.Generator().manual_seed(1))
    assert quadratic(rows, hessian_of(x)) == pytest.approx(2 * float((x @ rows.T).square().sum()) / 50, rel=1e-5)
