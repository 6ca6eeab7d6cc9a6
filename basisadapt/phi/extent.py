"""How far BA reaches: R of every module, the part of it that is used, and rows that tower over the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.phi.bank import index_tensor

ROUNDING = 1 + 1e-6
MEASURED_ROUNDING = 2e-6  # of the bound by norms: what the rounding of a product may add to a measured maximum
SMALLEST = 1e-2  # the smallest range, in units of φ's argument
TOWER = 64.0  # times what most rows reach
TOWERS = 16  # at most one row in so many towers over the others
MEASURED_AT_ONCE = 1 << 22  # entries of BA
MEASURED_AT_ONCE_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Extent:
    """Where the functions of M modules are compiled: on [−R, R].

    radius: R ≥ max |BA|, (M,), float64. share: what part of R BA is known to reach, (M,), in (0, 1]. zero:
    whether BA is zero, (M,).
    """

    radius: Tensor
    share: Tensor
    zero: Tensor

    @classmethod
    def of(cls, radius: Tensor) -> Extent:
        """All of ±R."""
        return cls(radius, torch.ones_like(radius), torch.zeros_like(radius, dtype=torch.bool))


@torch.no_grad()
def bounds(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest row of B times the largest column of A, of every pair (A, B), shape (M,), float64.

    Equal shapes go through together, so that the launches are few.
    """
    return _largest_row([A.T for A, _ in pairs]) * _largest_row([B for _, B in pairs]) * ROUNDING


def _largest_row(matrices: list[Tensor]) -> Tensor:
    """The largest norm of a row of each matrix, float64."""
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((tuple(matrix.shape), matrix.dtype), []).append(index)
    found = torch.empty(len(matrices), dtype=torch.float64, device=matrices[0].device)
    for (_, dtype), members in groups.items():
        stacked = torch.stack([matrices[i] for i in members])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch.linalg.vector_norm(stacked, dim=2, dtype=wide).amax(1)
        found[index_tensor(tuple(members), found.device)] = norms.double()
    return found


@torch.no_grad()
def largest(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """max |BA| of every pair, shape (K,), float64; on a GPU equal shapes go through together."""
    if pairs[0][0].device.type == "cpu":
        return torch.stack([_largest(A, B, MEASURED_AT_ONCE) for A, B in pairs])
    return _at_once(pairs, MEASURED_AT_ONCE_ELSEWHERE)


def _at_once(pairs: Sequence[tuple[Tensor, Tensor]], entries: int) -> Tensor:
    """The same, some entries of BA at a time."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, (A, B) in enumerate(pairs):
        groups.setdefault((A.shape, B.shape, A.dtype), []).append(index)
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
    """max |BA|, float64, some rows at a time; of K pairs, (K, ...) each, (K,)."""
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    A, B = A.to(wide), B.to(wide)
    rows = max(1, at_once // A.shape[-1])
    return torch.stack([(some @ A).abs_().amax((-2, -1)) for some in torch.split(B, rows, dim=-2)]).amax(0).double()


@torch.no_grad()
def towering(B: Tensor) -> Tensor | None:
    """The rows of B, by their numbers, that are more than TOWER times as large as the others; None if there are none.

    At most one row in TOWERS; to F they are so far out that a range which holds them would be coarse for the others.
    """
    few = max(1, len(B) // TOWERS)
    if len(B) <= few:
        return None
    sizes = torch.linalg.vector_norm(B.double(), dim=1)
    rows: Tensor = (sizes > TOWER * sizes.topk(few + 1).values[few]).nonzero().flatten()
    return rows if len(rows) else None


def without(B: Tensor, rows: Tensor | None) -> Tensor:
    """B without these rows."""
    if rows is None:
        return B
    others = torch.ones(len(B), dtype=torch.bool, device=B.device)
    others[rows] = False
    return B[others]
