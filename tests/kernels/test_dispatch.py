import pytest
import torch

from signbit import kernels
from signbit.kernels import cpu, reference
from signbit.layouts import Layout
from signbit.methods.rtn import integer_rows


@pytest.mark.parametrize(
    ("tokens", "int8", "kernel"), [(1, False, True), (95, False, True), (96, False, False), (96, True, True)]
)
def test_integers_are_unpacked_for_many_tokens(
    tokens: int, int8: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = integer_rows(torch.randn(30, 64), 8, "float16")
    called = []

    def noted(x: torch.Tensor, layout: Layout, int8: bool) -> torch.Tensor:
        called.append(int8)
        return reference.matmul(x, layout)

    monkeypatch.setattr(cpu, "matmul", noted)
    kernels.matmul(torch.randn(tokens, 64), layout, int8)
    assert called == [int8] * kernel
