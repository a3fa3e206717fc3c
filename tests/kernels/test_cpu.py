"""The C++ kernels equal the reference: every layout, every instruction set of this machine.

A new layout is one more line in MAKERS.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import signbit
from signbit import kernels
from signbit.kernels import cpu, reference
from signbit.layouts import HaarPlanes, Integers, Layout, Partial, SignFactors, SignPlanes, SplitPlanes, Structured
from signbit.layouts.haar_planes import SalientPart
from signbit.layouts.ranks import choices
from signbit.layouts.structured import kept_in_part
from signbit.modules import QuantizedLinear

Make = Callable[[int, int], Layout]

SIZES = [(1, 576), (5, 1), (16, 100), (33, 4097), (64, 256), (100, 576)]


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def sign_planes(
    planes: int = 1, group: int = 0, mean: bool = False, columns: bool = False, dtype: torch.dtype = torch.float16
) -> Make:
    def make(n: int, m: int) -> Layout:
        groups = 1 if group == 0 else -(-m // group)
        return SignPlanes.encode(
            random(planes, n, m) < 0,
            (0.5 + random(planes, n, groups).abs()).to(dtype),
            random(n, groups).to(dtype) if mean else None,
            group,
            (0.5 + random(m).abs()).to(dtype) if columns else None,
        )

    return make


def sign_factors(n: int, m: int) -> Layout:
    def scales(length: int) -> Tensor:
        return (0.5 + random(2, length).abs()).half()

    return SignFactors.encode(random(2, n, 40) < 0, random(2, 40, m) < 0, scales(n), scales(40), scales(m))


def salient_columns(m: int, group: int, share: float) -> tuple[Tensor, int]:
    """Which columns of m are salient, and in how many groups there are any."""
    columns = torch.rand(m, generator=torch.Generator().manual_seed(m)) < share
    return columns, sum(bool(part.any()) for part in columns.split(group or m))


def split_planes(
    group: int = 0, mean: bool = False, bitmap: bool = False, columns: bool = False, salient: float = 0.06
) -> Make:
    def make(n: int, m: int) -> Layout:
        groups = 1 if group == 0 else -(-m // group)
        marked, with_salient = salient_columns(m, group, salient)
        zones, count = ((2,) if bitmap else ()), int(marked.sum())
        return SplitPlanes.encode(
            negative=random(n, m) < 0,
            second=random(1, n, m)[0] < 0,
            salient=marked,
            scales=(0.5 + random(n, groups, 2).abs()).half(),
            means=random(2, n, groups).permute(1, 2, 0).half() if mean else None,
            salient_scales=(0.5 + random(n, with_salient, *zones, 2).abs()).half(),
            salient_means=random(n, with_salient, *zones).half() if mean else None,
            group_size=group,
            residual=random(2, n, count)[1] < 0 if bitmap else None,
            column_scales=(0.5 + random(2, m).abs()).half() if columns else None,
            salient_column_scales=(0.5 + random(*zones, 2, count).abs()).half() if columns else None,
        )

    return make


def haar_planes(axis: str, group: int = 0, means: int = 0, salient: float = 0.06) -> Make:
    def make(n: int, m: int) -> Layout:
        groups, bands = 1 if group == 0 else -(-m // group), 2 if axis == "row" else 1
        marked, with_salient = salient_columns(m, group, salient)
        part = None
        if marked.any():
            beside = random(3, n, int(marked.sum())) < 0
            part = SalientPart(
                columns=marked,
                scales=(0.5 + random(n, with_salient, 2).abs()).half(),
                means=random(2, n, with_salient).permute(1, 2, 0).half() if means else None,
                negative=beside[0] if axis == "row" else None,
                second=beside[1] if axis == "row" else None,
            )
        return HaarPlanes.encode(
            axis,
            random(n, m) < 0,
            random(1, n, m)[0] < 0,
            (0.5 + random(n, groups, bands, 2).abs()).half(),
            random(n, groups, bands, means).half() if means else None,
            part,
            group,
        )

    return make


def integers(bits: int, group: int = 128, zeros: bool = False, dtype: torch.dtype = torch.float16) -> Make:
    def make(n: int, m: int) -> Layout:
        groups = 1 if group == 0 else -(-m // group)
        generator = torch.Generator().manual_seed(n + m)
        codes = torch.randint(1 << bits, (n, m), generator=generator).to(torch.uint8)
        zero = torch.randint(1 << bits, (n, groups), generator=generator).to(torch.uint8) if zeros else None
        return Integers.encode(codes, (0.5 + random(n, groups).abs()).to(dtype), zero, bits, group)

    return make


def kept(n: int, m: int, keep: int, of: int) -> Tensor:
    generator = torch.Generator().manual_seed(n + m)
    cells, last = -(-m // of), (m - 1) % of + 1
    ways = choices(keep, of)
    chosen = ways[torch.randint(len(ways), (n, cells), generator=generator)].flatten(1)[:, :m].clone()
    places = torch.rand(n, last, generator=generator).argsort(1)
    chosen[:, m - last :] = places < kept_in_part(last, keep, of)
    return chosen


def structured(
    keep: int, of: int, regions: int = 3, group: int = 128, mean: bool = False, salient: float = 0.0
) -> Make:
    def make(n: int, m: int) -> Layout:
        groups = 1 if group == 0 else -(-m // group)
        marked, with_salient = salient_columns(m, group, salient)
        region = (random(n, m).abs() * 2).clamp(max=regions - 1).to(torch.uint8)
        region[:, marked] = region[:, marked].clamp(max=1)
        return Structured.encode(
            kept=kept(n, m, keep, of),
            keep=keep,
            of=of,
            negative=random(n, m) < 0,
            region=region,
            salient=marked,
            scales=(0.5 + random(n, groups, regions).abs()).half(),
            means=random(n, groups, regions).half() if mean else None,
            salient_scales=(0.5 + random(n, with_salient, 2).abs()).half(),
            salient_means=random(n, with_salient).half() if mean else None,
            group_size=group,
        )

    return make


def partial(
    bits: int,
    share: float = 0.1,
    group: int = 128,
    mean: bool = False,
    group_codes: bool = True,
    salient: Tensor | None = None,
) -> Make:
    def make(n: int, m: int) -> Layout:
        groups = 1 if group == 0 else -(-m // group)
        of_codes = groups if group_codes else 1
        generator = torch.Generator().manual_seed(n + m)
        return Partial.encode(
            negative=random(n, m) < 0,
            scales=(0.5 + random(n, groups).abs()).half(),
            means=random(n, groups).half() if mean else None,
            salient=torch.rand(n, m, generator=generator) < share if salient is None else salient,
            q=torch.randint(1 << (bits - 1), (n, m), generator=generator).to(torch.uint8),
            code_bits=bits,
            code_scales=(0.1 + random(n, of_codes).abs()).half(),
            code_offsets=random(n, of_codes).half() if mean else None,
            group_size=group,
        )

    return make


MAKERS: dict[str, Make] = {
    "sign": sign_planes(),
    "groups of 32": sign_planes(group=32, mean=True),
    "groups of 64": sign_planes(group=64, dtype=torch.bfloat16),
    "groups of 100": sign_planes(group=100, mean=True, dtype=torch.bfloat16),
    "groups of 7": sign_planes(group=7, mean=True),
    "two planes": sign_planes(planes=2, group=128, mean=True),
    "three planes": sign_planes(planes=3, group=128),
    "column scales": sign_planes(mean=True, columns=True),
    "sign factors": sign_factors,
    "split": split_planes(),
    "split in groups": split_planes(group=128, mean=True),
    "split, nothing salient": split_planes(group=100, salient=0),
    "split, all salient": split_planes(group=33, mean=True, salient=1),
    "split bitmap": split_planes(group=128, bitmap=True),
    "split bitmap, half salient": split_planes(group=7, mean=True, bitmap=True, salient=0.5),
    "split column scales": split_planes(group=64, mean=True, columns=True),
    "split bitmap, column scales": split_planes(mean=True, bitmap=True, columns=True),
    "Haar along rows": haar_planes("row", group=128, means=1),
    "Haar along rows, one group": haar_planes("row", means=2),
    "Haar along rows, odd groups": haar_planes("row", group=33, means=2, salient=0.5),
    "Haar along rows, nothing salient": haar_planes("row", group=64, salient=0),
    "Haar along columns": haar_planes("column", group=128, means=1),
    "Haar along columns, odd groups": haar_planes("column", group=7, means=2, salient=0.5),
    "Haar along columns, nothing salient": haar_planes("column", salient=0),
    "8 bits": integers(8),
    "7 bits": integers(7, group=100, zeros=True),
    "6 bits": integers(6, group=0),
    "5 bits": integers(5, group=32, zeros=True, dtype=torch.bfloat16),
    "4 bits": integers(4, zeros=True),
    "3 bits": integers(3, group=64),
    "2 bits": integers(2, group=7, zeros=True),
    "4 of 8": structured(4, 8, mean=True, salient=0.06),
    "4 of 8, without means": structured(4, 8, group=0, salient=0.06),
    "6 of 8, two regions": structured(6, 8, regions=2, group=64, mean=True, salient=0.5),
    "5 of 8, one region": structured(5, 8, regions=1),
    "1 of 4": structured(1, 4, regions=2, group=32, salient=0.06),
    "8 of 16": structured(8, 16, group=32),
    "2 of 5": structured(2, 5, group=35, mean=True, salient=0.06),
    "8 of 8": structured(8, 8, mean=True),
    "partial": partial(8, mean=True),
    "partial, a row's codes": partial(3, share=0.022, group=0),
    "partial, escapes": partial(4, share=0.002, group=100, mean=True, group_codes=False),
    "partial bitmap": partial(2, share=0.6, group=7, mean=True),
    "partial, nothing salient": partial(8, share=0),
}

needs_kernels = pytest.mark.skipif(not cpu.instruction_sets(), reason="installed without the C++ kernels")


@pytest.fixture(params=cpu.instruction_sets() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    if request.param == "none":
        pytest.skip("installed without the C++ kernels")
    before = cpu.instruction_set()
    cpu.use(request.param)
    yield request.param
    assert before is not None
    cpu.use(before)


def check(y: Tensor, x: Tensor, layout: Layout) -> None:
    """y is x W^T, up to the rounding of sums in float32 and of the result.

    Each output is compared with what it adds up, where no weight counts for less than the mean: a weight near zero may
    be the difference of two coefficients, which is as exact as these are.
    """
    W, X = layout.dequantize().double(), x.double()
    sizes = W.abs()
    bound = X.abs() @ sizes.maximum(sizes.mean()).T
    truth = X @ W.T
    unit = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[x.dtype]
    error = (y.double() - truth).abs()
    assert y.shape == (*x.shape[:-1], layout.shape[0])
    assert y.dtype == x.dtype
    assert (error <= 1e-5 * bound + unit * truth.abs() + 1e-12).all()
    if truth.shape[-1] > 5 and X.shape[-1] > 1:
        assert error.norm() <= (1e-5 + unit) * truth.norm()


def test_there_are_kernels_where_there_is_a_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    assert "portable" in cpu.instruction_sets()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_equals_the_reference(isa: str, name: str, n: int, m: int) -> None:
    layout = MAKERS[name](n, m)
    assert cpu.has_kernel(layout)
    for tokens in (1, 2, 16, 17):
        x = random(tokens, m)
        check(kernels.matmul(x, layout), x, layout)


@pytest.mark.parametrize("tokens", range(1, 18))
def test_any_number_of_tokens(isa: str, tokens: int) -> None:
    layout, x = MAKERS["two planes"](33, 576), random(tokens, 576)
    check(kernels.matmul(x, layout), x, layout)


@needs_kernels
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    layout, x = MAKERS[name](33, 576), random(3, 576).to(dtype)
    y = kernels.matmul(x, layout)
    check(y, x, layout)
    assert torch.equal(y, kernels.matmul(x.float(), layout).to(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_sixteen_bit_numbers_are_taken(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(1)
    layout = SignPlanes.encode(torch.zeros(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, 1).half(), None, 0)
    y = kernels.matmul(x, layout)
    finite = x.isfinite()
    assert torch.equal(y[finite], x[finite])
    assert not y[~finite].isfinite().any()


# Of sign, split and Haar planes: what goes by halfwords where there is AVX-512.
PLANES = [name for name in MAKERS if name.startswith(("sign", "group", "two", "three", "column", "split", "Haar"))]


@needs_kernels
@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("n", [96, 97, 161, 300])
def test_tiles_of_many_rows(name: str, n: int) -> None:
    layout = MAKERS[name](n, 1100)
    for tokens in (1, 2, 3, 7, 16, 35):
        x = random(tokens, 1100)
        check(kernels.matmul(x, layout), x, layout)


@needs_kernels
@pytest.mark.parametrize("name", PLANES)
def test_activations_of_all_sizes(name: str) -> None:
    # One far above the others, all alike, all of one sign, and steps of very different sizes.
    layout, x = MAKERS[name](35, 640), random(5, 640)
    x[0, 300] = 1e5
    x[1], x[2] = 1.0, x[2].abs()
    x[3] *= torch.logspace(-12, 4, 640)
    x[4, ::2] *= -1e-6
    check(kernels.matmul(x, layout), x, layout)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", ["sign", "two planes", "column scales"])
@pytest.mark.parametrize("size", [1e-33, 1e33])
def test_activations_at_the_ends_of_floats(name: str, size: float, tokens: int) -> None:
    layout, x = MAKERS[name](35, 640), random(tokens, 640)
    y, truth = kernels.matmul(x * size, layout), kernels.matmul(x, layout) * size
    assert (y - truth).norm(dtype=torch.float64) <= 1e-5 * truth.norm(dtype=torch.float64)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_sum_whose_double_is_no_float(isa: str, tokens: int, int8: bool) -> None:
    layout = SignPlanes.encode(torch.ones(1, 1, 64, dtype=torch.bool), torch.full((1, 1, 1), 0.01).half(), None, 0)
    x = torch.zeros(tokens, 64)
    x[:, 3] = 2e38
    assert kernels.matmul(x, layout, int8=int8) == pytest.approx(-2e36, rel=1e-3)


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", PLANES)
def test_many_tokens_are_multiplied_as_one_by_one(name: str, int8: bool) -> None:
    # Not to the last bit: few tokens may have another kernel, which may round other columns to 8 bits together.
    layout, x = MAKERS[name](161, 1100), random(39, 1100)
    y = kernels.matmul(x, layout, int8=int8)
    each = torch.stack([kernels.matmul(token, layout, int8=int8) for token in x])
    apart = 0.02 if int8 and name.startswith("Haar") else 2e-6
    assert (y - each).norm() <= apart * each.norm()


@needs_kernels
@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_shapes_of_batches(batch: tuple[int, ...]) -> None:
    layout, x = MAKERS["sign"](16, 100), random(*batch, 100)
    check(kernels.matmul(x, layout), x, layout)


@needs_kernels
def test_inputs_that_are_not_contiguous() -> None:
    layout = MAKERS["two planes"](33, 576)
    for x in (random(576, 4, 3).permute(2, 1, 0), random(5, 2 * 576)[:, ::2], random(576).expand(3, 576)):
        check(kernels.matmul(x, layout), x, layout)


@needs_kernels
def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="99 features"):
        kernels.matmul(random(1, 99), MAKERS["sign"](16, 100))


def test_planes_at_odd_addresses(isa: str) -> None:
    # A file is mapped, not read, and its tensors lie where they lie.
    layout = MAKERS["sign"](33, 100)
    shifted = torch.empty(layout.get_buffer("signs").numel() + 1, dtype=torch.uint8)[1:]
    shifted = shifted.view(layout.get_buffer("signs").shape).copy_(layout.get_buffer("signs"))
    moved = type(layout)(layout.spec, {"signs": shifted, "scales": layout.get_buffer("scales")})
    assert moved.get_buffer("signs").data_ptr() % 2
    x = random(2, 100)
    assert torch.equal(kernels.matmul(x, moved), kernels.matmul(x, layout))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_threads_do_not_change_a_bit(isa: str, name: str, int8: bool) -> None:
    layout, x = MAKERS[name](1000, 576), random(3, 576)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(kernels.matmul(x, layout, int8=int8))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def rounded(x: Tensor) -> Tensor:
    """x in 8 bits, 128 columns at a time."""
    out = torch.nn.functional.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    largest = out.abs().amax(-1, keepdim=True)
    return ((out * (127 / largest.clamp(min=1e-30))).round() * (largest / 127)).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("m", [100, 576, 4097])
@pytest.mark.parametrize(
    "name",
    [
        "sign",
        "groups of 64",
        "groups of 100",
        "groups of 7",
        "three planes",
        "8 bits",
        "3 bits",
        "5 of 8, one region",
        "partial",
    ],
)
def test_activations_in_8_bits(isa: str, name: str, m: int) -> None:
    layout, x = MAKERS[name](33, m), random(17, m)
    x[3] = 0
    check(kernels.matmul(x, layout, int8=True), rounded(x), layout)


# What few tokens are multiplied with row by row, in chunks of 512 columns and panels of 4096, and what keeps lookups.
ROW_BY_ROW: dict[str, Make] = {
    "sign, one group": sign_planes(mean=True),
    "sign, groups of 384": sign_planes(group=384, mean=True),
    "sign, groups of 64": sign_planes(group=64, mean=True, dtype=torch.bfloat16),
    "sign, groups of 32": sign_planes(planes=2, group=32),
    "split": split_planes(group=128, mean=True),
    "split, one group": split_planes(mean=True, salient=0.03),
    "split, groups of 64": split_planes(group=64),
    "split, a quarter salient": split_planes(group=128, mean=True, salient=0.25),
    "split, half salient": split_planes(group=128, salient=0.5),
    "split, all salient": split_planes(group=128, salient=1),
    "Haar along rows": haar_planes("row", group=128, means=2),
    "Haar along rows, one mean": haar_planes("row", group=256, means=1, salient=0.3),
    "Haar along rows, nothing salient": haar_planes("row", salient=0),
    "Haar along columns": haar_planes("column", group=128, means=2),
    "Haar along columns, one mean": haar_planes("column", means=1, salient=0.2),
    "4 of 8": structured(4, 8, salient=0.06),
    "4 of 8, two regions": structured(4, 8, regions=2, group=256, salient=0.2),
    "4 of 8, one region": structured(4, 8, regions=1, group=0),
    "4 of 8, means": structured(4, 8, mean=True, salient=0.2),
    "2 of 4": structured(2, 4, salient=0.06),
    "5 of 8, means": structured(5, 8, mean=True, salient=0.2),
    "6 of 8, two regions": structured(6, 8, regions=2, group=256, mean=True, salient=0.03),
    "5 of 8, one region": structured(5, 8, regions=1, group=0),
    "1 of 4": structured(1, 4, regions=2, salient=0.06),
    "3 of 8": structured(3, 8, salient=0.06),
    "1 of 8, means": structured(1, 8, mean=True, salient=0.1),
    "7 of 8": structured(7, 8, group=256, salient=0.06),
    "3 of 4, means": structured(3, 4, mean=True, salient=0.06),
    "1 of 2": structured(1, 2, regions=2),
    "5 of 8, groups of 64": structured(5, 8, group=64, mean=True, salient=0.06),
    "8 of 16": structured(8, 16, group=64),
}


@needs_kernels
@pytest.mark.parametrize("name", ROW_BY_ROW)
@pytest.mark.parametrize("m", [1, 33, 640, 4128, 9000])
def test_few_tokens(name: str, m: int) -> None:
    for n in (1, 35):
        layout, x = ROW_BY_ROW[name](n, m), random(2, m)
        for tokens in (1, 2):
            check(kernels.matmul(x[:tokens], layout), x[:tokens], layout)
        exact, y = kernels.matmul(x, layout), kernels.matmul(x, layout, int8=True)
        assert (y - exact).norm() < 0.02 * (x.square() @ layout.dequantize().square().T).sum().sqrt()
        if name.startswith("sign"):
            check(y, rounded(x), layout)


@needs_kernels
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("n", "m"), [(35, 64), (35, 192), (33, 4160), (19, 32768)])
def test_partial_matrices_where_salient_weights_crowd(mean: bool, n: int, m: int) -> None:
    # Somewhere they are more than fit one look-up, and most rows are odd numbers of windows.
    salient, x = random(n, m) > 1.5, random(2, m)
    salient[n // 2, m // 4 :] = True
    salient[n // 3] = False
    layout = partial(8, group=128 if m % 128 == 0 else 0, mean=mean, salient=salient)(n, m)
    assert isinstance(layout, Partial)
    assert 2 <= layout.spec.gap_bits <= 6
    for tokens in (1, 2):
        check(kernels.matmul(x[:tokens], layout), x[:tokens], layout)
        check(kernels.matmul(x[:tokens], layout, int8=True), rounded(x[:tokens]), layout)


@needs_kernels
@pytest.mark.parametrize("name", ["4 of 8", "4 of 8, means", "2 of 4", "5 of 8, means", "3 of 8", "7 of 8", "split"])
@pytest.mark.parametrize("m", [4097, 32767, 32768, 32769])
def test_few_tokens_of_rows_that_are_wide(name: str, m: int) -> None:
    layout, x = ROW_BY_ROW[name](3, m), random(2, m)
    check(kernels.matmul(x, layout), x, layout)


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", [*ROW_BY_ROW, "partial"])
def test_threads_do_not_change_a_bit_of_few_tokens(name: str, int8: bool) -> None:
    layout, x = (MAKERS | ROW_BY_ROW)[name](1000, 576), random(2, 576)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5, 70):  # the last are more than there are tasks
        torch.set_num_threads(threads)
        results.append(kernels.matmul(x, layout, int8=int8))
        assert torch.equal(results[-1][1:], kernels.matmul(x[1:], layout, int8=int8))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@needs_kernels
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("group", [0, 128, 384])
@pytest.mark.parametrize(("share", "gap_bits"), [(0.03, 6), (0.06, 5), (0.1, 4), (0.2, 3), (0.3, 2)])
def test_partial_matrices_of_many_windows(share: float, gap_bits: int, group: int, mean: bool) -> None:
    # Few tokens have kernels of their own where rows are whole windows of 64 columns.
    layout, x = partial(8, share, group, mean)(35, 4160), random(2, 4160)
    assert isinstance(layout, Partial)
    assert layout.spec.gap_bits == gap_bits
    for tokens in (1, 2):
        check(kernels.matmul(x[:tokens], layout), x[:tokens], layout)
        check(kernels.matmul(x[:tokens], layout, int8=True), rounded(x[:tokens]), layout)


@needs_kernels
@pytest.mark.parametrize("salient_row", [0, 7, 15])
def test_partial_matrices_with_rows_where_nothing_is_salient(salient_row: int) -> None:
    n, m = 17, 32768
    salient = torch.zeros(n, m, dtype=torch.bool)
    salient[salient_row] = random(m) > 1
    layout = Partial.encode(
        negative=random(n, m) < 0,
        scales=(0.5 + random(n, 1).abs()).half(),
        means=None,
        salient=salient,
        q=torch.full((n, m), 5, dtype=torch.uint8),
        code_bits=4,
        code_scales=(0.1 + random(n, 1).abs()).half(),
        code_offsets=None,
        group_size=0,
    )
    check(kernels.matmul(random(1, m), layout), random(1, m), layout)


@needs_kernels
@pytest.mark.parametrize("name", ["partial", "partial, a row's codes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_exact_products(name: str, value: float) -> None:
    layout, x = MAKERS[name](33, 576), random(2, 576)
    before = kernels.matmul(x, layout)
    x[1, 5] = value
    y = kernels.matmul(x, layout)
    assert not y[1].isfinite().any()
    assert torch.equal(y[0], before[0])


@needs_kernels
@pytest.mark.parametrize("name", MAKERS)
def test_rounding_activations_costs_little(name: str) -> None:
    layout, x = MAKERS[name](100, 576), random(4, 576)
    exact, y = kernels.matmul(x, layout), kernels.matmul(x, layout, int8=True)
    assert 0 < (y - exact).norm() < 0.015 * exact.norm()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_8_bits(isa: str, name: str, value: float) -> None:
    layout, x = MAKERS[name](33, 576), random(3, 576)
    before = kernels.matmul(x, layout, int8=True)
    x[1, 5] = value
    y = kernels.matmul(x, layout, int8=True)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], before[::2])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-37])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_tiniest_activations_in_8_bits(isa: str, size: float, tokens: int) -> None:
    for name in ("sign", "4 bits", "4 of 8", "partial"):
        y = kernels.matmul(size * random(tokens, 576), MAKERS[name](33, 576), int8=True)
        assert (y.abs() < 1e-30).all()


def test_a_bitmap_may_mark_what_is_behind_its_columns(isa: str) -> None:
    layout, x = MAKERS["partial bitmap"](33, 100), random(3, 100)
    expected = kernels.matmul(x, layout)
    layout.get_buffer("positions")[:, 13:] = 255
    layout.check("layout")
    assert torch.equal(kernels.matmul(x, layout), expected)


@needs_kernels
def test_inputs_that_are_negated_views() -> None:
    layout, x = MAKERS["sign"](16, 100), random(3, 100)
    assert torch.equal(kernels.matmul(torch._neg_view(x), layout), kernels.matmul(-x, layout))


@needs_kernels
def test_weights_that_move_or_change() -> None:
    layout, x = MAKERS["groups of 64"](33, 576), random(1, 576)
    expected = kernels.matmul(x, layout)
    layout.share_memory()  # moves tensors within the same objects
    assert torch.equal(kernels.matmul(x, layout), expected)
    other = SignPlanes(layout.spec, {k: v.roll(1, -2) for k, v in layout.state_dict().items()})
    layout.load_state_dict(other.state_dict())
    assert torch.equal(kernels.matmul(x, layout), expected.roll(1, -1))
    twin = copy.deepcopy(layout)
    del layout, other
    assert torch.equal(kernels.matmul(x, twin), expected.roll(1, -1))


@needs_kernels
def test_many_python_threads() -> None:
    layout, x = MAKERS["sign"](1000, 576), random(2, 576)
    expected = kernels.matmul(x, layout)
    found: list[Tensor] = []

    def work() -> None:
        found.extend(kernels.matmul(x, layout) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(torch.equal(y, expected) for y in found)


FORK = """
import os, torch
from signbit import kernels
from signbit.kernels import cpu
from signbit.layouts import SignPlanes
layout = SignPlanes.encode(torch.randn(1, 999, 64) < 0, torch.rand(1, 999, 1).half(), None, 0)
x = torch.randn(1, 64)
torch.set_num_threads(4)
y = kernels.matmul(x, layout)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(y, kernels.matmul(x, layout)) for _ in range(200)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_kernels
def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


_WITHOUT_MEMORY = """
import resource, torch
from signbit.kernels import cpu
from signbit.layouts import SignPlanes

torch.set_num_threads(2)
n, m = 256, 4_000_000
signs = torch.zeros(1, n, m // 8, dtype=torch.uint8)
layout = SignPlanes.encode(torch.zeros(1, n, 32, dtype=torch.bool), torch.ones(1, n, 1).half(), None, 0)
small = torch.randn(1, 32)
wanted = cpu.matmul(small, layout, False)
wide = SignPlanes.around(type(layout.spec)((n, m), 1, 0, False, "float16"), [signs, torch.ones(1, n, 1).half()])
x = torch.randn(1, m)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
try:
    cpu.matmul(x, wide, False)
except MemoryError:
    print("MemoryError", torch.equal(cpu.matmul(small, layout, False), wanted))
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs more addresses")
def test_threads_without_memory_raise_and_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_MEMORY], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "MemoryError True\n"), done.stderr


@needs_kernels
def test_the_threads_are_torchs() -> None:
    if sys.platform != "linux":
        pytest.skip("torch's OpenMP is looked up on Linux")
    assert cpu.thread_pool() == "torch"


@needs_kernels
def test_an_instruction_set_is_forced_by_the_environment() -> None:
    program = "from signbit.kernels import cpu; print(cpu.instruction_set())"
    run = [sys.executable, "-c", program]
    forced = subprocess.run(run, env=os.environ | {"SIGNBIT_ISA": "portable"}, capture_output=True, text=True)
    assert forced.stdout == "portable\n"
    unknown = subprocess.run(run, env=os.environ | {"SIGNBIT_ISA": "mmx"}, capture_output=True, text=True)
    assert unknown.stderr.splitlines()[-1].startswith("signbit.errors.SignbitError: SIGNBIT_ISA=mmx: this machine has")


def test_without_kernels_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    cpu._available.cache_clear()
    layout, x = MAKERS["sign"](16, 100), random(1, 100)
    try:
        with pytest.warns(UserWarning, match="Install g\\+\\+ or clang") as said:
            for _ in range(3):
                assert torch.equal(kernels.matmul(x, layout), reference.matmul(x, layout))
        assert len(said) == 1
        assert cpu.instruction_set() is None
    finally:
        monkeypatch.undo()
        cpu._available.cache_clear()


@needs_kernels
def test_set_activations() -> None:
    linear, x = QuantizedLinear(MAKERS["sign"](100, 576), random(100)), random(2, 576)
    model = torch.nn.Sequential(linear)
    exact = model(x)
    signbit.set_activations(model, "int8")
    assert torch.equal(model(x), kernels.matmul(x, linear.packed, int8=True) + random(100))
    assert not torch.equal(model(x), exact)
    signbit.set_activations(model, "exact")
    assert torch.equal(model(x), exact)
    with pytest.raises(signbit.SignbitError, match="'int4' is none of exact, int8"):
        signbit.set_activations(model, "int4")
