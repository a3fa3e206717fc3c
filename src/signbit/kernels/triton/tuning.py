"""Blocks: the tile that a kernel takes, for a layout, a class of shapes and an architecture.

They are looked up, in this order, in

    the user's cache     ~/.cache/signbit/blocks.json (SIGNBIT_CACHE names another directory): what
                         ``signbit bench kernels --device cuda --tune`` found on this machine
    blocks.json here     what is shipped; an entry without "measured" is a considered guess
    its "default"        the same, for all layouts

under "<architecture>/<layout>/<class>", then "any/<layout>/<class>" and "any/default/<class>". A class is the form and,
for gemv, the tokens as a power of two and whether rows are long; for gemm whether tokens are many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from signbit.errors import SignbitError
from signbit.safetensors_file import write_text
from signbit.user_cache import cache_directory

_LONG_ROWS = 8192
_MANY_TOKENS = 256


@dataclass(frozen=True)
class Blocks:
    """BLOCK_N, BLOCK_K and BLOCK_T (of gemm only: gemv takes all tokens at once), and how a program is made."""

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        sizes = (self.rows, self.columns, self.tokens, self.warps)
        if any(size < 1 or size & (size - 1) for size in sizes) or self.columns < 32 or self.rows < 2:
            raise ValueError(f"{self} is not made of powers of two, of at least 2 rows and 32 columns")


# Tried by --tune. A gemv program holds tokens x rows x columns sums in registers, a gemm program rows x tokens.
GEMV_CANDIDATES = [
    Blocks(rows, columns, 16, warps, 2)
    for rows in (2, 4, 8, 16)
    for columns in (64, 128, 256, 512)
    for warps in (1, 2, 4, 8)
    if 4 <= rows * columns // (32 * warps) <= 32
]
GEMM_CANDIDATES = [
    Blocks(rows, columns, tokens, warps, stages)
    for rows in (64, 128)
    for columns in (32, 64)
    for tokens in (16, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
]


def shape_class(shape: tuple[int, int], tokens: int) -> str:
    if tokens <= 8:
        power = 1 << (tokens - 1).bit_length()
        return f"gemv {power}, {'long' if shape[1] > _LONG_ROWS else 'short'} rows"
    return f"gemm, {'many' if tokens >= _MANY_TOKENS else 'few'} tokens"


@cache
def architecture(device: torch.device) -> str:
    """Such as "sm_90"."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def blocks_for(name: str, shape: tuple[int, int], tokens: int, arch: str) -> Blocks:
    kind = shape_class(shape, tokens)
    for table in (_read(cache_path()), _read(Path(__file__).with_name("blocks.json"))):
        for key in (f"{arch}/{name}/{kind}", f"any/{name}/{kind}", f"any/default/{kind}"):
            if key in table:
                fields = {field: value for field, value in table[key].items() if field != "measured"}
                try:
                    return Blocks(**fields)
                except (TypeError, ValueError) as error:
                    raise SignbitError(f"blocks.json, {key!r}: {error}: delete {cache_path()}") from error
    raise AssertionError(f"blocks.json has no default for {kind}")


def cache_path() -> Path:
    return cache_directory() / "blocks.json"


def remember(found: dict[str, dict[str, Any]]) -> None:
    """Keep what was measured, beside what is there already."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_read(path) | found, indent=1, sort_keys=True) + "\n")
    blocks_for.cache_clear()


def tune(
    name: str, shape: tuple[int, int], tokens: int, arch: str, seconds: Callable[[Blocks], float | None]
) -> dict[str, dict[str, Any]]:
    """The fastest blocks, as an entry for :func:`remember`; ``seconds`` is None for blocks that do not fit."""
    candidates: Iterable[Blocks] = GEMV_CANDIDATES if tokens <= 8 else GEMM_CANDIDATES
    timed = [(taken, blocks) for blocks in candidates if (taken := seconds(blocks)) is not None]
    if not timed:
        raise SignbitError(f"{name}: none of the blocks runs on {arch}: no kernel to tune")
    taken, best = min(timed, key=lambda one: one[0])
    measured = {"shape": list(shape), "tokens": tokens, "microseconds": taken * 1e6}
    return {f"{arch}/{name}/{shape_class(shape, tokens)}": {**asdict(best), "measured": measured}}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SignbitError(f"{path} is not JSON ({error}): delete it") from error
    if not isinstance(table, dict):
        raise SignbitError(f"{path} holds no table of blocks: delete it")
    return table
