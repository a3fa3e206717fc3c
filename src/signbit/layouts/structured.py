"""Structured N:M: N of every M consecutive columns of a row are kept, the others are zero.

A kept weight has a sign and belongs to a *part*, and each part has its scale (and mean) in each row and group. Ordinary
columns have one to three parts, the *regions*; a few *salient* columns, the same for all rows, are one part more and
carry a residual:

    ordinary   W_ij = scale[r] s + mean[r]                    r = the weight's region
    salient    W_ij = (scale_o s + scale_r t) + mean          t = sign of the residual
    pruned     W_ij = 0

Signs and regions are stored for kept weights only, in the order of their columns; which are kept is stored as ranks
(ranks.py). At salient columns the region map holds the residual's sign, which is why one region, which needs no map,
allows no salient columns.

A width that is no multiple of M is thought of as widened to one: the q = ceil(m / M) cells of a row keep N each, of
which a last cell with only r columns in the matrix has ceil(r N / M) there and the rest right behind the edge.

Stored for n rows, m columns, q cells in a row with K = q N kept weights, B bits a rank, R regions, G groups of which S
have salient columns:

| tensor | shape | dtype | what |
|---|---|---|---|
| signs | [n, packed_width(K)] | uint8 | bit 1 = negative |
| ranks | [n, packed_width(q B)] | uint8 | which are kept |
| regions | [n, packed_width(K)], or [n, trit_width(K)] for 3 | uint8 | only if R > 1; salient column: residual's sign |
| salient | [packed_width(m)] | uint8 | only if there are any; 1 = salient column |
| scales | [n, G, R] | scale dtype | |
| means | [n, G, R] | scale dtype | only if ``mean`` |
| salient_scales | [n, S, 2] | scale dtype | only if there are salient columns; first order, residual |
| salient_means | [n, S] | scale dtype | only if there are salient columns, and ``mean`` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, scale_dtype, spread
from signbit.layouts.bits import pack_bits, packed_width, unpack_bits, unpack_floats, unpack_signs
from signbit.layouts.ranks import MAX_OF, choices, pack_ranks, rank, rank_bits, rank_count, unpack_ranks
from signbit.layouts.trits import LARGEST_BYTE, pack_trits, trit_width, unpack_trits

MAX_REGIONS = 3


@dataclass(frozen=True)
class StructuredSpec(LayoutSpec):
    keep: int
    of: int
    group_size: int
    regions: int
    mean: bool
    salient_columns: int
    salient_groups: int
    scale_dtype: str

    @property
    def cells(self) -> int:
        return -(-self.shape[1] // self.of)

    @property
    def kept(self) -> int:
        """Kept weights in a row, those behind the edge included."""
        return self.cells * self.keep

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        self._check()
        n, m = self.shape
        groups, dtype = group_count(m, self.group_size), scale_dtype(self.scale_dtype)
        bits = packed_width(self.kept)
        tensors = {
            "signs": TensorSpec((n, bits), torch.uint8, "signs"),
            "ranks": TensorSpec((n, packed_width(self.cells * rank_bits(self.keep, self.of))), torch.uint8, "masks"),
        }
        if self.regions > 1:
            width = trit_width(self.kept) if self.regions == 3 else bits
            tensors["regions"] = TensorSpec((n, width), torch.uint8, "masks")
        tensors["scales"] = TensorSpec((n, groups, self.regions), dtype, "scales")
        if self.mean:
            tensors["means"] = TensorSpec((n, groups, self.regions), dtype, "means")
        if self.salient_columns:
            tensors["salient"] = TensorSpec((packed_width(m),), torch.uint8, "columns")
            tensors["salient_scales"] = TensorSpec((n, self.salient_groups, 2), dtype, "scales")
            if self.mean:
                tensors["salient_means"] = TensorSpec((n, self.salient_groups), dtype, "means")
        return tensors

    def _check(self) -> None:
        if not 1 <= self.keep <= self.of <= MAX_OF:
            raise ValueError(f"keep {self.keep!r} of {self.of!r} is not a choice of N of M <= {MAX_OF}")
        if self.group_size % self.of:
            raise ValueError(f"group_size {self.group_size!r} is no multiple of {self.of}")
        if not 1 <= self.regions <= MAX_REGIONS:
            raise ValueError(f"{self.regions!r} is not a number of regions, 1 to {MAX_REGIONS}")
        groups = group_count(self.shape[1], self.group_size)
        least, most = bool(self.salient_columns), min(self.salient_columns, groups)
        if self.salient_columns > self.shape[1] or not least <= self.salient_groups <= most:
            raise ValueError(f"{self.salient_columns!r} salient columns in {self.salient_groups!r} of {groups} groups")
        if self.salient_columns and self.regions == 1:
            raise ValueError("salient columns with one region")


def kept_values(
    signs: Tensor, members: Tensor, scales: Tensor, means: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Float32 values [n, k]; methods and the layout both use this, so they agree to the bit.

    All float32. members [P, n, k]: 1 in the part that a weight belongs to and 0 in the others (a pruned one belongs to
    none, and is 0); scales, means [P, n, k or 1]; signs [n, k]: +-1; residual [n, k]: scale times sign at salient
    weights, 0 elsewhere.
    """
    # Sums of zeros and one number: exact, and many times faster than choosing.
    values = (scales * members).sum(0) * signs
    if residual is not None:
        values = values + residual
    return values if means is None else values + (means * members).sum(0)


def kept_in_part(columns: int, keep: int, of: int) -> int:
    """How many of the ``columns`` <= ``of`` columns of a cell are kept."""
    return -(-columns * keep // of)


class Structured(Layout):
    kind = "structured"
    Spec = StructuredSpec
    of_columns = frozenset({"salient"})
    spec: StructuredSpec
    signs: Tensor
    ranks: Tensor
    scales: Tensor

    @classmethod
    def encode(
        cls,
        kept: Tensor,
        keep: int,
        of: int,
        negative: Tensor,
        region: Tensor,
        salient: Tensor,
        scales: Tensor,
        means: Tensor | None,
        salient_scales: Tensor,
        salient_means: Tensor | None,
        group_size: int,
    ) -> Structured:
        """Pack a matrix of which bool ``kept`` [n, m] has ``keep`` in every ``of`` columns.

        negative: bool [n, m]; region: uint8 [n, m], at salient columns 1 where the residual is negative; salient: bool
        [m]; coefficients as they are stored, [n, 0, ..] where no column is salient. What the planes have at pruned
        weights does not matter.
        """
        n, m = kept.shape
        spec = StructuredSpec(
            shape=(n, m),
            keep=keep,
            of=of,
            group_size=group_size,
            regions=scales.shape[2],
            mean=means is not None,
            salient_columns=int(salient.sum()),
            salient_groups=salient_scales.shape[1],
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        )
        cells = _cells(kept, spec)
        flat = cells.flatten(1)
        behind = flat.shape[1] - m

        def compact(plane: Tensor) -> Tensor:
            return torch.nn.functional.pad(plane, (0, behind))[flat].view(n, spec.kept)

        tensors = {
            "signs": pack_bits(compact(negative)),
            "ranks": pack_ranks(rank(cells, keep), rank_bits(keep, of)),
            "scales": scales,
            "salient": pack_bits(salient),
            "salient_scales": salient_scales,
        }
        if spec.regions > 1:
            regions = compact(region)
            tensors["regions"] = pack_trits(regions) if spec.regions == 3 else pack_bits(regions.bool())
        if means is not None:
            tensors["means"] = means
        if salient_means is not None:
            tensors["salient_means"] = salient_means
        return cls(spec, tensors)

    @property
    def nominal_bits(self) -> float:
        return self.spec.keep / self.spec.of * (1 + self.spec.salient_columns / self.spec.shape[1])

    def check(self, name: str) -> None:
        spec = self.spec
        largest = int(self._ranks(slice(None)).max()) if self.ranks.numel() else 0
        if largest >= rank_count(spec.keep, spec.of):
            raise SignbitError(f"{name}.ranks holds {largest}, which is no rank of {spec.keep} of {spec.of}")
        if spec.regions == 3 and int(self.get_buffer("regions").max()) > LARGEST_BYTE:
            raise SignbitError(f"{name}.regions has bytes above {LARGEST_BYTE}, which stand for no five trits")
        if spec.salient_columns:
            marked = unpack_bits(self.get_buffer("salient"), spec.shape[1])
            groups = len(self._groups_with(marked))
            if (int(marked.sum()), groups) != (spec.salient_columns, spec.salient_groups):
                raise SignbitError(
                    f"{name}.salient marks {int(marked.sum())} columns in {groups} groups, config.json says "
                    f"{spec.salient_columns} in {spec.salient_groups}"
                )

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        spec = self.spec
        ranks = self._ranks(rows)
        signs = unpack_signs(self.signs[rows], spec.kept)
        members = self._region_members(rows)
        scales, means, residual = self._spread("scales", rows), None, None
        if spec.mean:
            means = self._spread("means", rows)
        if spec.salient_columns:
            salient, salient_scales, salient_means = self._salient(rows, ranks)
            # The region map holds residual signs there.
            residual = salient_scales[1] * (2 * members[0] - 1) * salient
            members = torch.cat([members * (1 - salient), salient.unsqueeze(0)])
            scales = torch.cat([scales, salient_scales[:1]])
            if means is not None and salient_means is not None:
                means = torch.cat([means, salient_means.unsqueeze(0)])
        values = kept_values(signs, members, scales, means, residual)
        return self._scatter(values, ranks)

    def _ranks(self, rows: slice) -> Tensor:
        return unpack_ranks(self.ranks[rows], self.spec.cells, rank_bits(self.spec.keep, self.spec.of))

    def _region_members(self, rows: slice) -> Tensor:
        """Regions of kept weights, as if no column were salient: float32 [R, n, K]."""
        if self.spec.regions == 1:
            return torch.ones(1, 1, 1, device=self.device)
        stored, kept = self.get_buffer("regions")[rows], self.spec.kept
        if self.spec.regions == 2:
            second = unpack_floats(stored, kept, 0.0, 1.0)
            return torch.stack([1 - second, second])
        trits = unpack_trits(stored, kept)
        return torch.stack([(trits == region).float() for region in range(3)])

    def _spread(self, name: str, rows: slice) -> Tensor:
        """Coefficients [n, G, R] of groups as those of kept weights [R, n, K]."""
        return self._to_kept(self.get_buffer(name)[rows].permute(2, 0, 1))

    def _to_kept(self, coefficients: Tensor) -> Tensor:
        # Groups are whole cells, so kept weights are in groups just as columns are.
        return spread(coefficients, self.spec.group_size // self.spec.of * self.spec.keep, self.spec.kept)

    def _salient(self, rows: slice, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of kept weights: 1 where the column is salient, [n, K]; scales [2, n, K]; means [n, K]."""
        spec = self.spec
        marked = unpack_bits(self.get_buffer("salient"), spec.shape[1])
        by_cell = torch.nn.functional.pad(marked.float(), (0, spec.cells * spec.of - spec.shape[1])).view(-1, spec.of)
        offsets = choices(spec.keep, spec.of).nonzero()[:, 1].view(-1, spec.keep).to(self.device)
        salient = by_cell.expand(len(ranks), -1, -1).gather(2, offsets[ranks]).flatten(1)
        present = self._groups_with(marked)

        def all_groups(name: str) -> Tensor:
            """[n, S, ..] to [n, G, ..], zero where there is none."""
            stored = self.get_buffer(name)[rows].float()
            groups = group_count(spec.shape[1], spec.group_size)
            full = stored.new_zeros(stored.shape[0], groups, *stored.shape[2:])
            return full.index_copy(1, present, stored)

        scales = self._to_kept(all_groups("salient_scales").permute(2, 0, 1))
        return salient, scales, self._to_kept(all_groups("salient_means")) if spec.mean else None

    def _groups_with(self, marked: Tensor) -> Tensor:
        """Groups that have marked columns, in order."""
        return (marked.nonzero().squeeze(1) // (self.spec.group_size or self.spec.shape[1])).unique()

    def _scatter(self, values: Tensor, ranks: Tensor) -> Tensor:
        """Values [n, K] of kept weights to their columns, zeros between them: [n, m]."""
        keep, of = self.spec.keep, self.spec.of
        # Each column's place among the kept ones of its cell; pruned ones take the zero behind these.
        chosen = choices(keep, of)
        places = torch.where(chosen, chosen.cumsum(1) - 1, keep).to(self.device)
        cells = torch.nn.functional.pad(values.view(*ranks.shape, keep), (0, 1))
        return cells.gather(2, places[ranks]).flatten(1)[:, : self.spec.shape[1]]


def _cells(kept: Tensor, spec: StructuredSpec) -> Tensor:
    """``kept`` as cells [n, q, M] with N kept in each, those of the last one behind the edge included."""
    n, m = kept.shape
    last = m - (spec.cells - 1) * spec.of
    here = kept_in_part(last, spec.keep, spec.of)
    padded = torch.nn.functional.pad(kept, (0, spec.of - last))
    padded[:, m : m + spec.keep - here] = True
    cells = padded.view(n, spec.cells, spec.of)
    if bool((cells.sum(2) != spec.keep).any()):
        raise ValueError(f"not every cell keeps {spec.keep} of {spec.of}")
    return cells
