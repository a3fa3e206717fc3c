"""Where bfloat16 is used, and that float32 stays float32 at full speed."""

import threading

import pytest
import torch

from signbit import precision
from signbit.precision import autocast, fast_float32, uses_bfloat16

CPU = torch.device("cpu")


def setting() -> str:
    return str(getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", ""))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which oneDNN is the faster one."""
    if not setting():
        pytest.skip("this torch has no switch for products in float32")
    monkeypatch.setattr(precision, "_onednn_is_better", lambda: True)


def test_only_auto_looks_at_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device, there=there: there)
        assert uses_bfloat16("auto", CPU) is there
        assert uses_bfloat16("bfloat16", CPU)
        assert not uses_bfloat16("float32", CPU)


def test_autocast_can_be_entered_again() -> None:
    x = torch.ones(2, 2)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        context = autocast(name, CPU)  # type: ignore[arg-type]
        for _ in range(2):
            with context:
                assert (x @ x).dtype == dtype


def test_products_stay_exact_to_float32() -> None:
    """Whatever this machine's processor is."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 300, generator=generator), torch.randn(100, 300, generator=generator)
    with fast_float32():
        found = torch.nn.functional.linear(x, w)
    wanted = x.double() @ w.double().T
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


def test_the_switch_is_put_back(onednn: None) -> None:
    before = setting()
    with fast_float32():
        assert setting() == "bf16"
        with fast_float32():
            pass
        assert setting() == "bf16"
    assert setting() == before
    with pytest.raises(RuntimeError), fast_float32():
        raise RuntimeError
    assert setting() == before


def test_threads_that_overlap_leave_it_as_it_was(onednn: None) -> None:
    before, first_is_in, second_is_done = setting(), threading.Event(), threading.Event()

    def first() -> None:
        with fast_float32():
            first_is_in.set()
            second_is_done.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with fast_float32():
        pass
    assert setting() == "bf16"
    second_is_done.set()
    thread.join()
    assert setting() == before


def test_nothing_is_set_where_onednn_is_not_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_onednn_is_better", lambda: False)
    before = setting()
    with fast_float32():
        assert setting() == before
