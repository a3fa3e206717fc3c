"""Random packed matrices, as the methods would leave them.

Nothing is quantized: planes are random bits, masks have as many marks as a method makes, and coefficients have a size
that keeps products in range. What a kernel does depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from signbit.layouts import HaarPlanes, Integers, Layout, Partial, SignFactors, SignPlanes, SplitPlanes, Structured
from signbit.layouts.haar_planes import SalientPart
from signbit.layouts.ranks import choices

GROUP = 128
# Shares of columns and weights that are salient.
_SALIENT_COLUMNS, _SALIENT_WEIGHTS = 0.03, 0.1


def _bits(*size: int) -> Tensor:
    return torch.randint(0, 2, size, dtype=torch.uint8).bool()


def _coefficients(width: int, *size: int) -> Tensor:
    return ((0.5 + torch.rand(size)) * width**-0.5).half()


def _groups(m: int) -> int:
    return -(-m // GROUP)


def _salient_columns(m: int) -> tuple[Tensor, int]:
    """Salient columns, and how many groups have some."""
    salient = torch.rand(m) < _SALIENT_COLUMNS
    salient[0] = True
    return salient, sum(bool(part.any()) for part in salient.split(GROUP))


def _kept(n: int, m: int, keep: int, of: int) -> Tensor:
    ways = choices(keep, of)
    return ways[torch.randint(0, len(ways), (n, -(-m // of)))].flatten(1)[:, :m]


def sign(n: int, m: int) -> Layout:
    return SignPlanes.encode(_bits(1, n, m), _coefficients(m, 1, n, 1), None, 0)


def sign_in_groups(n: int, m: int) -> Layout:
    return SignPlanes.encode(_bits(1, n, m), _coefficients(m, 1, n, _groups(m)), _coefficients(m, n, _groups(m)), GROUP)


def two_planes(n: int, m: int) -> Layout:
    return SignPlanes.encode(_bits(2, n, m), _coefficients(m, 2, n, _groups(m)), None, GROUP)


def onebit(n: int, m: int) -> Layout:
    return SignPlanes.encode(_bits(1, n, m), _coefficients(m, 1, n, 1), None, 0, _coefficients(1, m))


def sign_factors(n: int, m: int) -> Layout:
    """At most one bit a weight, if that pays for a word of ranks."""
    rank = max(32, n * m // (n + m) // 32 * 32)
    scales = (_coefficients(rank * m, 1, n), _coefficients(1, 1, rank), _coefficients(1, 1, m))
    return SignFactors.encode(_bits(1, n, rank), _bits(1, rank, m), *scales)


def billm(n: int, m: int) -> Layout:
    salient, groups = _salient_columns(m)
    return SplitPlanes.encode(
        negative=_bits(n, m),
        second=_bits(n, m),
        salient=salient,
        scales=_coefficients(m, n, _groups(m), 2),
        means=_coefficients(m, n, _groups(m), 2),
        salient_scales=_coefficients(m, n, groups, 2),
        salient_means=_coefficients(m, n, groups),
        group_size=GROUP,
    )


def hbllm(n: int, m: int) -> Layout:
    salient, groups = _salient_columns(m)
    count = int(salient.sum())
    beside = SalientPart(
        salient, _coefficients(m, n, groups, 2), _coefficients(m, n, groups, 2), _bits(n, count), _bits(n, count)
    )
    return HaarPlanes.encode(
        axis="row",
        negative=_bits(n, m),
        second=_bits(n, m),
        scales=_coefficients(m, n, _groups(m), 2, 2),
        means=_coefficients(m, n, _groups(m), 2, 2),
        salient=beside,
        group_size=GROUP,
    )


def stbllm(n: int, m: int) -> Layout:
    salient, groups = _salient_columns(m)
    region = torch.randint(0, 3, (n, m), dtype=torch.uint8)
    return Structured.encode(
        kept=_kept(n, m, 4, 8),
        keep=4,
        of=8,
        negative=_bits(n, m),
        region=torch.where(salient, region.clamp(max=1), region),
        salient=salient,
        scales=_coefficients(m, n, _groups(m), 3),
        means=None,
        salient_scales=_coefficients(m, n, groups, 2),
        salient_means=None,
        group_size=GROUP,
    )


def pb_llm(n: int, m: int) -> Layout:
    return Partial.encode(
        negative=_bits(n, m),
        scales=_coefficients(m, n, _groups(m)),
        means=None,
        salient=torch.rand(n, m) < _SALIENT_WEIGHTS,
        q=torch.randint(0, 128, (n, m), dtype=torch.uint8),
        code_bits=8,
        code_scales=_coefficients(m, n, 1) / 64,
        code_offsets=None,
        group_size=GROUP,
    )


def int8(n: int, m: int) -> Layout:
    return _integers(n, m, 8, 0)


def int4(n: int, m: int) -> Layout:
    return _integers(n, m, 4, GROUP)


def _integers(n: int, m: int, bits: int, group_size: int) -> Layout:
    codes = torch.randint(0, 2**bits, (n, m), dtype=torch.uint8)
    groups = _groups(m) if group_size else 1
    return Integers.encode(codes, _coefficients(m * 4**bits, n, groups), None, bits, group_size)


MAKERS: dict[str, Callable[[int, int], Layout]] = {
    "sign": sign,
    "sign, groups": sign_in_groups,
    "two planes": two_planes,
    "onebit": onebit,
    "sign factors": sign_factors,
    "billm": billm,
    "hbllm": hbllm,
    "stbllm 4:8": stbllm,
    "pb-llm": pb_llm,
    "int8": int8,
    "int4": int4,
}
