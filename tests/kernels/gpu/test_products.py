"""The Triton kernels equal the reference: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from choosing import random_rounding
from kernels.test_cpu import MAKERS, check, random
from signbit import SignbitError, kernels
from signbit.kernels import dispatch, reference
from signbit.kernels import triton as gpu
from signbit.kernels.triton import sparse, tuning
from signbit.kernels.triton.tuning import Blocks
from signbit.layouts import Layout, Structured
from signbit.methods.rounding import Choices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


def multiply(x: Tensor, layout: Layout) -> Tensor:
    y = gpu.matmul(x.to(DEVICE), layout.to(DEVICE))
    assert y is not None
    layout.to("cpu")
    return y.cpu()


def check_rounded(y: Tensor, x: Tensor, layout: Layout) -> None:
    """With weights and activations rounded to x's dtype on their way to tensor cores."""
    truth = reference.matmul(x.float(), layout)
    assert y.dtype == x.dtype
    assert (y.float() - truth).norm() <= HALF[x.dtype] * truth.norm()


@pytest.mark.parametrize("name", MAKERS)
def test_equals_the_reference(name: str) -> None:
    for n, m, tokens in [(5, 1, 1), (18, 100, 2), (18, 100, 17)]:
        layout, x = MAKERS[name](n, m), random(tokens, m)
        assert gpu.has_kernel(layout)
        check(multiply(x, layout), x, layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("n", "m"), [(33, 576), (3, 4097)])
def test_larger_matrices(name: str, n: int, m: int) -> None:
    layout = MAKERS[name](n, m)
    for tokens in (1, 7, 8, 33):
        x = random(tokens, m)
        check(multiply(x, layout), x, layout)


@pytest.mark.parametrize("name", ["sign", "sign factors", "split in groups", "Haar along rows", "4 of 8", "partial"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    layout = MAKERS[name](18, 200)
    few, many = random(3, 200).to(dtype), random(20, 200).to(dtype)
    check(multiply(few, layout), few, layout)
    check_rounded(multiply(many, layout), many, layout)


@pytest.mark.parametrize("tokens", range(1, 10))
def test_any_number_of_tokens(tokens: int) -> None:
    layout, x = MAKERS["two planes"](10, 100), random(tokens, 100)
    check(multiply(x, layout), x, layout)


@pytest.mark.parametrize("name", ["sign", "split in groups", "Haar along columns", "8 bits", "4 of 8", "partial"])
def test_one_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "UNPACK_TOKENS", 18)
    for tokens in (1, 17, 18):  # sizes of 1 are constants to Triton
        layout, x = MAKERS[name](1, 100), random(tokens, 100)
        check(multiply(x, layout), x, layout)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_shapes_of_batches(batch: tuple[int, ...]) -> None:
    layout, x = MAKERS["sign"](16, 100), random(*batch, 100)
    check(multiply(x, layout), x, layout)


def test_inputs_that_are_not_contiguous() -> None:
    layout = MAKERS["two planes"](9, 100)
    for x in (random(100, 4, 3).permute(2, 1, 0), random(5, 200)[:, ::2], random(100).expand(3, 100)):
        check(multiply(x, layout), x, layout)


def test_inputs_that_do_not_fit() -> None:
    layout = MAKERS["sign"](16, 100)
    with pytest.raises(ValueError, match="99 features"):
        multiply(random(1, 99), layout)
    assert gpu.matmul(random(1, 100).double().to(DEVICE), layout) is None


def test_weights_beyond_float16() -> None:
    layout = MAKERS["groups of 64"](16, 100)
    layout.get_buffer("scales").mul_(2.0**20)
    x = (random(20, 100) * 2.0**-20).half()
    y = multiply(x, layout)
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), reference.matmul(x.float(), layout), rtol=1e-2, atol=1e-2)


def unpacked(layout: Layout, dtype: torch.dtype, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Each of a layout's factors as it is unpacked, ``rows`` rows at a time, and as it is."""
    chains = gpu._chains(layout.to(DEVICE))
    assert chains is not None
    pairs = []
    for product, part in zip(chain.from_iterable(chains), chain.from_iterable(layout.chains()), strict=True):
        if product.dense is None:
            continue
        W = torch.full(part.shape, torch.nan, dtype=dtype, device=DEVICE)
        for first in range(0, len(W), rows):
            product.dense(W[first : first + rows], first)
        pairs.append((W.cpu(), part.dequantize().cpu()))
    layout.to("cpu")
    return pairs


@pytest.mark.parametrize("name", MAKERS)
def test_unpacked_for_torch(name: str) -> None:
    for n, m, dtype in [(37, 100, torch.float32), (17, 291, torch.bfloat16), (3, 1, torch.float16)]:
        pairs = unpacked(MAKERS[name](n, m), dtype, rows=16)
        # Pairs of columns at odd places are left to gemm.
        assert pairs or name == "Haar along rows, odd groups"
        for W, truth in pairs:
            # The interpreter rounds towards zero.
            unit = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
            torch.testing.assert_close(W.float(), truth, rtol=unit, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_many_tokens_are_multiplied_by_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "UNPACK_TOKENS", 9)
    for weights in (1 << 27, 2000):
        monkeypatch.setattr(gpu, "DENSE_WEIGHTS", weights)
        layout, x = MAKERS[name](50, 100), random(9, 100)
        check(multiply(x, layout), x, layout)


@pytest.mark.parametrize("name", ["sign", "sign factors", "groups of 64", "partial", "Haar along columns"])
@pytest.mark.parametrize("dtype", HALF)
def test_many_tokens_in_half_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "UNPACK_TOKENS", 9)
    monkeypatch.setattr(gpu, "DENSE_WEIGHTS", 2000)
    layout, x = MAKERS[name](50, 100), random(9, 100).to(dtype)
    check_rounded(multiply(x, layout), x, layout)


@pytest.mark.parametrize(
    ("name", "dtype", "tokens", "products"),
    [
        ("sign", torch.float32, 127, 0),
        ("sign", torch.float32, 128, 1),
        ("sign", torch.float16, 128, 1),
        ("groups of 64", torch.float16, 128, 0),  # bfloat16 scales: float32 without tensor cores
        ("sign factors", torch.bfloat16, 128, 2),  # V of two paths; what U gives is added up in float32
        ("sign factors", torch.float16, 128, 0),  # between V and U float16 may not do
        ("partial", torch.float16, 9, 1),  # no gemm of its own
    ],
)
def test_what_is_unpacked(
    name: str, dtype: torch.dtype, tokens: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(gpu, "_multiply_dense", lambda x, y, product: found.append(y.zero_()))
    multiply(random(tokens, 64).to(dtype), MAKERS[name](16, 64))
    assert len(found) == products


def test_prepared_again_when_moved() -> None:
    layout, x = MAKERS["split in groups"](10, 100), random(1, 100)
    check(multiply(x, layout), x, layout)
    layout.signs = layout.signs.clone().bitwise_not()  # type: ignore[operator]
    check(multiply(x, layout), x, layout)
    check(kernels.matmul(x, layout), x, layout)  # on the CPU: what was prepared for one is not taken by the other


@pytest.mark.parametrize("tokens", [1, 17])
def test_blocks_do_not_change_the_product(tokens: int) -> None:
    layout, x = MAKERS["4 of 8"](18, 100), random(tokens, 100)
    y = gpu.matmul(x.to(DEVICE), layout.to(DEVICE), Blocks(16, 32, 16, 4, 1))
    assert y is not None
    check(y.cpu(), x, layout.to("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("name", MAKERS)
def test_cuda_graphs(name: str) -> None:
    layout = MAKERS[name](33, 576).to(DEVICE)
    for tokens in (1, 32, 200):
        x = random(tokens, 576).to(DEVICE)
        expected = kernels.matmul(x, layout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.matmul(x, layout)
        graph.replay()
        torch.testing.assert_close(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_compiled() -> None:
    layout = MAKERS["split in groups"](33, 576).to(DEVICE)
    x = random(3, 576).to(DEVICE)
    compiled = torch.compile(lambda x: kernels.matmul(x, layout), fullgraph=True)
    torch.testing.assert_close(compiled(x), kernels.matmul(x, layout))


def test_dispatch_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "signbit.kernels.triton", None)
    dispatch.triton_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="signbit\\[gpu\\]"):
            assert dispatch.triton_kernels() is None
        assert dispatch.triton_kernels() is None
    finally:
        dispatch.triton_kernels.cache_clear()


def test_at_most_two_of_four() -> None:
    layout = MAKERS["4 of 8"](16, 64)
    assert isinstance(layout, Structured)
    W = layout.dequantize()
    assert not sparse.fits(layout)
    assert sparse.fits(MAKERS["1 of 4"](16, 64))  # type: ignore[arg-type]
    parts = sparse.halves(W)
    assert torch.equal(parts[0] + parts[1], W)
    for part in parts:
        values, places = sparse.compress(part)
        assert values.shape == (16, 32)
        assert torch.equal(sparse.expand(values, places), part)
    with pytest.raises(SignbitError, match="halves"):
        sparse.compress(W)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs sparse tensor cores")
def test_sparse_tensor_cores() -> None:
    layout, x = MAKERS["4 of 8"](64, 128).to(DEVICE), random(32, 128).half().to(DEVICE)
    y = sparse.SparseMatrix(layout, torch.float16).matmul(x)  # type: ignore[arg-type]
    torch.testing.assert_close(y, x @ layout.dequantize().half().T, rtol=1e-2, atol=1e-1)


def test_tuned_blocks_are_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path))
    tuning.blocks_for.cache_clear()
    shipped = tuning.blocks_for("sign_planes", (64, 64), 1, "sm_90")
    wanted = next(blocks for blocks in tuning.GEMV_CANDIDATES if blocks != shipped)

    def seconds(blocks: Blocks) -> float | None:
        return None if blocks.warps == 8 else 1.0 - (blocks == wanted) * 0.5

    tuning.remember(tuning.tune("sign_planes", (64, 64), 1, "sm_90", seconds))
    assert tuning.blocks_for("sign_planes", (64, 64), 1, "sm_90") == wanted
    assert tuning.blocks_for("sign_planes", (64, 64), 1, "sm_80") == shipped
    tuning.cache_path().write_text("[", encoding="utf-8")
    tuning.blocks_for.cache_clear()
    with pytest.raises(SignbitError, match="delete it"):
        tuning.blocks_for("sign_planes", (64, 64), 1, "sm_90")
    monkeypatch.undo()
    tuning.blocks_for.cache_clear()


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("each_weight", [False, True])
@pytest.mark.parametrize(("shares", "before"), [(True, False), (True, True), (False, False)])
def test_columns_are_rounded_in_turn(even: bool, each_weight: bool, shares: bool, before: bool) -> None:
    for n, k in [(1, 1), (50, 7), (33, 40)]:
        case = random_rounding(n, k, even=even, each_weight=each_weight, shares=shares, before=before)
        case.run(gpu.round_in_turn, DEVICE)
        case.check()


def test_of_values_alike_a_target_below_them_gets_the_last() -> None:
    case = random_rounding(3, 1, shares=False)
    case.choices = Choices.among([torch.tensor([1.0, 1.0, 0.0]).unsqueeze(1).expand(3, 3)], torch.zeros(1, 1))
    case.targets = torch.tensor([[1.5, 0.75, 0.0]])
    case.run(gpu.round_in_turn, DEVICE)
    assert case.places.tolist() == [[0, 1, 2]]
