"""The reference: packed matrix products, and the modules that hold packed matrices."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from signbit import kernels
from signbit.kernels import reference
from signbit.kernels.reference import matmul
from signbit.layouts import HaarPlanes, Integers, Layout, Partial, SignPlanes, SplitPlanes, Structured
from signbit.layouts.haar_planes import SalientPart
from signbit.methods.pruning import keep_best
from signbit.methods.rtn import integer_rows
from signbit.modules import QuantizedLinear, TiedHead, quantized_embedding

SHAPES = [(1, 1), (1, 576), (100, 1), (100, 100), (100, 576), (576, 100)]


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def coefficients(*size: int) -> Tensor:
    return random(*size).abs().half()


Make = Callable[[int, int], Layout]


def sign_planes(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    return SignPlanes.encode(random(2, n, m) < 0, coefficients(2, n, groups), random(n, groups).half(), 64)


def split_planes(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    salient = torch.arange(m) % 3 == 1
    with_salient = sum(bool(part.any()) for part in salient.split(64))
    return SplitPlanes.encode(
        negative=random(n, m) < 0,
        second=random(m, n).T < 0,
        salient=salient,
        scales=coefficients(n, groups, 2),
        means=None,
        salient_scales=coefficients(n, with_salient, 2),
        salient_means=None,
        group_size=64,
    )


def haar_planes(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    salient = torch.arange(m) % 3 == 0
    beside = random(n, int(salient.sum())) < 0
    return HaarPlanes.encode(
        axis="row",
        negative=random(n, m) < 0,
        second=random(m, n).T < 0,
        scales=coefficients(n, groups, 2, 2),
        means=random(n, groups, 2, 1).half(),
        salient=SalientPart(salient, coefficients(n, groups, 2), random(n, groups, 2).half(), beside, ~beside),
        group_size=64,
    )


def integers(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    codes = torch.arange(n * m).view(n, m) * 7 % 8
    return Integers.encode(codes.byte(), coefficients(n, groups), codes[:, :groups].byte(), 3, 64)


def partial(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    return Partial.encode(
        negative=random(n, m) < 0,
        scales=coefficients(n, groups),
        means=random(n, groups).half(),
        salient=random(m, n).T > 1,
        q=random(n, m).abs().clamp(max=7).to(torch.uint8),
        code_bits=4,
        code_scales=coefficients(n, groups),
        code_offsets=coefficients(n, groups),
        group_size=64,
    )


def structured(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    salient = torch.arange(m) % 3 == 0
    return Structured.encode(
        kept=keep_best(random(n, m), 3, 8),
        keep=3,
        of=8,
        negative=random(m, n).T < 0,
        region=((random(n, m) > 0) * (~salient + 1)).to(torch.uint8),
        salient=salient,
        scales=coefficients(n, groups, 3),
        means=None,
        salient_scales=coefficients(n, groups, 2),
        salient_means=None,
        group_size=64,
    )


LAYOUTS: list[Make] = [haar_planes, partial, sign_planes, split_planes, structured, integers]


def check(y: Tensor, x: Tensor, layout: Layout) -> None:
    """y is x W^T up to the rounding of float32 sums."""
    W, X = layout.dequantize().double(), x.double()
    bound = X.abs() @ W.abs().T  # what rounding errors are relative to
    assert y.shape == (*x.shape[:-1], layout.shape[0])
    assert ((y.double() - X @ W.T).abs() <= 1e-6 * bound + 1e-12).all()


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3), (0,), ()])
def test_matmul(make: Make, n: int, m: int, batch: tuple[int, ...]) -> None:
    layout = make(n, m)
    x = random(*batch, m)
    check(matmul(x, layout), x, layout)


@pytest.mark.parametrize("make", LAYOUTS)
def test_matmul_of_inputs_that_are_not_contiguous(make: type) -> None:
    layout = make(100, 576)
    x = random(576, 4, 3).permute(2, 1, 0)
    check(matmul(x, layout), x, layout)
    every_other = random(5, 2 * 576)[:, ::2]
    check(matmul(every_other, layout), every_other, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_in_float32_whatever_the_inputs(dtype: torch.dtype) -> None:
    layout = sign_planes(100, 576)
    x = random(7, 576).to(dtype)
    y = matmul(x, layout)
    assert y.dtype == dtype
    assert torch.equal(y, matmul(x.float(), layout).to(dtype))


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("tile", [1, 1000, 576 * 99])
def test_the_tile_size_does_not_matter(make: Make, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, x = make(100, 576), random(3, 576)
    monkeypatch.setattr(reference, "TILE_WEIGHTS", tile)
    rows: list[int] = []
    dequantize = layout.dequantize

    def noted(part: slice) -> Tensor:
        rows.append(part.stop - part.start)
        return dequantize(part)

    monkeypatch.setattr(layout, "dequantize", noted)
    y = matmul(x, layout)
    monkeypatch.undo()
    check(y, x, layout)
    assert sum(rows) == 100
    assert max(rows) == max(1, tile // 576)  # that many rows are unpacked at once, no more


def test_quantized_linear_adds_its_bias() -> None:
    layout, bias, x = split_planes(100, 72), random(100), random(2, 3, 72)
    assert torch.equal(QuantizedLinear(layout, bias)(x), kernels.matmul(x, layout) + bias)
    assert torch.equal(QuantizedLinear(layout)(x), kernels.matmul(x, layout))


def test_a_bias_of_another_dtype_does_not_change_the_output_dtype() -> None:
    layout, x = sign_planes(100, 72), random(3, 72)
    assert QuantizedLinear(layout, random(100).bfloat16())(x).dtype == torch.float32
    assert QuantizedLinear(layout, random(100))(x.bfloat16()).dtype == torch.bfloat16


def test_changing_a_models_dtype_leaves_packed_tensors_alone() -> None:
    linear = QuantizedLinear(sign_planes(100, 72), random(100))
    before = linear.packed.dequantize()
    linear.bfloat16()
    assert linear.bias is not None
    assert linear.bias.dtype == torch.bfloat16
    assert torch.equal(linear.packed.dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_looked_up_and_scaled(dtype: torch.dtype) -> None:
    class Scaled(nn.Embedding):
        """As Gemma's."""

        def __init__(self) -> None:
            super().__init__(30, 12)
            self.embed_scale = torch.tensor(5.5)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale.to(self.weight.dtype)

    scaled = Scaled().requires_grad_(False)
    packed = integer_rows(scaled.weight, 8, "float16")
    ids = torch.tensor([[0, 29, 3], [3, 3, 7]])
    scaled.weight.data = packed.dequantize()
    scaled.to(dtype)
    found = quantized_embedding(scaled, packed, dtype)(ids)
    assert found.dtype == dtype
    assert torch.equal(found, scaled(ids))


def test_plain_embeddings_are_not_scaled() -> None:
    packed = integer_rows(random(30, 12), 4, "float16")
    ids = torch.tensor([5, 0, 29])
    assert torch.equal(quantized_embedding(nn.Embedding(30, 12), packed, torch.float32)(ids), packed.dequantize()[ids])


def test_a_tied_head_multiplies_by_the_embeddings() -> None:
    packed = integer_rows(random(30, 12), 8, "float16")
    head = TiedHead(quantized_embedding(nn.Embedding(30, 12), packed, torch.float32), None)
    x = random(2, 12)
    check(head(x), x, packed)
    assert not head.state_dict()  # nothing is stored twice
