"""The range of BA: R of every module, the share of it that BA reaches, and rows far larger than the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.core.grouping import grouped
from basisadapt.phi.bank import index_tensor

ROUNDING = 1 + 1e-6
MEASURED_ROUNDING = 2e-6  # rounding error of a measured maximum, relative to the bound by norms
SMALLEST = 1e-2  # the smallest range, in units of φ's argument
TOWER = 64.0  # a row towers if it is more than this many times as large as most
TOWERS = 16  # at most one row in this many towers
MEASURED_AT_ONCE = 1 << 22  # entries of BA held at a time
MEASURED_AT_ONCE_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Extent:
    """The ranges [−R, R] on which the functions of M modules are compiled.

    - `radius`: R ≥ max |BA|, shape (M,), float64.
    - `share`: a lower bound of max |BA| / R, shape (M,), in (0, 1].
    - `zero`: whether BA = 0, shape (M,), bool.
    """

    radius: Tensor
    share: Tensor
    zero: Tensor

    @classmethod
    def of(cls, radius: Tensor) -> Extent:
        """Ranges of radius (M,), of which BA reaches the ends."""
        return cls(radius, torch.ones_like(radius), torch.zeros_like(radius, dtype=torch.bool))


@torch.no_grad()
def bounds(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """An upper bound of max |BA|: the largest row norm of B times the largest column norm of A, shape (M,), float64.

    pairs: A (r, n) and B (m, r). Matrices of equal shape are stacked, to launch few kernels.
    """
    columns, rows = ([pair[side] for pair in pairs] for side in (0, 1))
    return _largest_norm(columns, transposed=True) * _largest_norm(rows) * ROUNDING


def _largest_norm(matrices: list[Tensor], transposed: bool = False) -> Tensor:
    """The largest norm of a row of each matrix, or of a column, float64."""
    groups = grouped(((tuple(matrix.shape), matrix.dtype), index) for index, matrix in enumerate(matrices))
    found = torch.empty(len(matrices), dtype=torch.float64, device=matrices[0].device)
    for (_, dtype), members in groups.items():
        stacked = torch.stack([matrices[i] for i in members])
        if transposed:
            stacked = stacked.mT.contiguous()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch.linalg.vector_norm(stacked, dim=2, dtype=wide).amax(1)
        found[index_tensor(tuple(members), found.device)] = norms.double()
    return found


@torch.no_grad()
def largest(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """max |BA| of every pair A (r, n), B (m, r), shape (K,), float64. On a GPU, equal shapes are stacked."""
    if pairs[0][0].device.type == "cpu":
        return torch.stack([_largest(A, B, MEASURED_AT_ONCE) for A, B in pairs])
    return _at_once(pairs, MEASURED_AT_ONCE_ELSEWHERE)


def _at_once(pairs: Sequence[tuple[Tensor, Tensor]], entries: int) -> Tensor:
    """`largest` with equal shapes stacked, for up to `entries` entries of BA at a time."""
    groups = grouped(((A.shape, B.shape, A.dtype), index) for index, (A, B) in enumerate(pairs))
    found = torch.empty(len(pairs), dtype=torch.float64, device=pairs[0][0].device)
    for members in groups.values():
        A, B = pairs[members[0]]
        step = max(1, entries // (len(B) * A.shape[1]))
        for start in range(0, len(members), step):
            some = tuple(members[start : start + step])
            left, right = (torch.stack([pairs[i][side] for i in some]) for side in (1, 0))
            found[index_tensor(some, found.device)] = _largest(right, left, entries // len(some))
    return found


def _largest(A: Tensor, B: Tensor, at_once: int) -> Tensor:
    """max |BA|, float64, for up to `at_once` entries at a time; shape (K,) for A (K, r, n) and B (K, m, r)."""
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    A, B = A.to(wide), B.to(wide)
    rows = max(1, at_once // A.shape[-1])
    return torch.stack([(some @ A).abs_().amax((-2, -1)) for some in torch.split(B, rows, dim=-2)]).amax(0).double()


@torch.no_grad()
def towering(factors: Sequence[Tensor]) -> list[Tensor | None]:
    """The indices of the rows of each B (m, r) that are over TOWER times as large as the others; None without any.

    They are at most one row in TOWERS. A range that held them would be too coarse for the other rows. The host waits
    for the device, once for all of a shape.
    """
    found: list[Tensor | None] = [None] * len(factors)
    groups = grouped(((B.shape, B.dtype), index) for index, B in enumerate(factors))
    for (shape, _), members in groups.items():
        if shape[0] > (few := max(1, shape[0] // TOWERS)):
            sizes = torch.linalg.vector_norm(torch.stack([factors[i] for i in members]).double(), dim=2)
            tower = sizes > TOWER * sizes.topk(few + 1, dim=1).values[:, few:]
            for index, rows, has in zip(members, tower, tower.any(1).tolist(), strict=True):
                found[index] = rows.nonzero().flatten() if has else None
    return found


def without(B: Tensor, rows: Tensor | None) -> Tensor:
    """B (m, r) without these rows."""
    if rows is None:
        return B
    others = torch.ones(len(B), dtype=torch.bool, device=B.device)
    others[rows] = False
    return B[others]
