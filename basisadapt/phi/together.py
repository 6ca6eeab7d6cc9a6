"""Tables of many modules at once, in as many kernel launches as one module's table takes.

A table has one of SIZES, and all modules whose tables have one kind are batched, at the largest one's size: cells are
cheap, launches are not. Tables much smaller than the largest are a batch of their own. The cubics are a linear
image of the functions at equally spaced places, through which autograd carries the gradients to α, ω, the grid and the
gain of all modules.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from basisadapt.core.grouping import grouped
from basisadapt.phi.bank import Transfer, index_tensor
from basisadapt.phi.cubic_tables import FEWEST, FINE, Cells, Made, kinds, reach
from basisadapt.phi.cubics import PackedRow, Row
from basisadapt.phi.series import Tables

SIZES = tuple(FINE * FEWEST // 2 * number << k for k in range(12) for number in (2, 3))  # cells on either side of zero
AT_ONCE = 1 << 22  # cells made at a time
SMALLER = 4  # how many times as large a table may be made as it has to be

Key = tuple[type[Made], int, torch.dtype]  # a table's kind, half size and dtype


def fit(
    transfer: Transfer, radius: Tensor, tolerances: Sequence[float], most: Sequence[int], least: Sequence[int]
) -> list[tuple[type[Made], int] | None]:
    """The kind and half size of the smallest accurate table of each of M functions, or None, as in `cubic_tables.fit`.

    radius: R, shape (M,). The host waits for the device.
    """
    found: list[tuple[type[Made], int] | None] = [None] * len(radius)
    far = reach(transfer, radius).tolist()
    for kind in kinds(transfer.basis):
        waiting: dict[int, list[int]] = {}
        for index, has in enumerate(found):
            if has is None and math.isfinite(far[index]):
                first = max(kind.fewest(transfer.basis, tolerances[index], far[index]), least[index])
                waiting.setdefault(bisect.bisect_left(SIZES, first), []).append(index)
        while waiting and (size := min(waiting)) < len(SIZES):
            half = SIZES[size]
            for some in _some([index for index in waiting.pop(size) if 2 * half <= most[index]], half):
                of_some, asked = pick(transfer, some), radius.new_tensor([tolerances[index] for index in some])
                cells = Cells.of(of_some, radius[index_tensor(some, radius.device)], half)
                for index, is_close in zip(some, kind.close(of_some, cells, asked).tolist(), strict=True):
                    if is_close:
                        found[index] = (kind, half)
                    else:
                        waiting.setdefault(size + 1, []).append(index)
    return found


def rows(tables: Tables, parameters: tuple[Tensor, ...], radius: Tensor, fitted: Mapping[int, Key]) -> dict[int, Row]:
    """The tables of the modules in `fitted`, by index; radius: R, shape (M,). The host does not wait for a GPU."""
    sizes = _shared(set(fitted.values()))
    groups = grouped((sizes[key], index) for index, key in fitted.items())
    made: dict[int, Row] = {}
    with torch.no_grad():
        all_of_them = tables(*(p.double() for p in parameters))
    for (kind, half, dtype), members in groups.items():
        for some in _some(members, half):
            with torch.no_grad():
                transfer, ends = pick(all_of_them, some), radius[index_tensor(some, radius.device)]
                cells, path = Cells.of(transfer, ends, half), transfer.scaling if transfer.path else 0.0
                beside = {
                    PackedRow.SCALE: 1 / ends,
                    PackedRow.REACH: ends / cells.step,
                    PackedRow.PATH: path * ends,
                    PackedRow.INVERSE: 1 / cells.step,
                    PackedRow.SLOPE: torch.full_like(ends, path),
                    PackedRow.HALF: torch.full_like(ends, half),
                }
                ordered = torch.stack([beside[place] for place in range(len(beside))], 1)
                packed = functional.pad(ordered, (0, PackedRow.SIZE - len(beside))).to(dtype)
            cubics = _Cubics.apply(tables, some, kind, cells, dtype, *parameters)  # type: ignore[no-untyped-call]
            for index, row, numbers in zip(some, cubics.unbind(), packed.unbind(), strict=True):
                made[index] = Row(row, half, numbers, path)
    return made


def _shared(keys: Collection[Key]) -> dict[Key, Key]:
    """For each kind, half size and dtype those of the batch that it joins."""
    joined: dict[Key, Key] = {}
    largest: dict[tuple[type[Made], torch.dtype], int] = {}
    for key in sorted(keys, key=lambda key: -key[1]):
        kind, half, dtype = key
        if SMALLER * half < largest.setdefault((kind, dtype), half):
            largest[kind, dtype] = half
        joined[key] = kind, largest[kind, dtype], dtype
    return joined


def _some(members: Sequence[int], half: int) -> Iterator[tuple[int, ...]]:
    """The members in tuples of at most AT_ONCE cells."""
    step = max(1, AT_ONCE // (2 * half))
    for start in range(0, len(members), step):
        yield tuple(members[start : start + step])


def pick(transfer: Transfer, modules: tuple[int, ...]) -> Transfer:
    """The functions of the modules with these indices."""
    if modules == tuple(range(len(transfer.gain))):
        return transfer
    index = index_tensor(modules, transfer.gain.device)
    return transfer.with_parameters(*(p[index] for p in transfer.parameters))


class _Cubics(torch.autograd.Function):
    """p_0..p_3 of every cell of some modules, shape (m, cells, 4).

    Its graph is kept, so that the backward pass can run many times: gradient accumulation uses one table repeatedly.
    """

    @staticmethod
    def forward(
        ctx: Any, tables: Tables, modules: tuple[int, ...], kind: type[Made], cells: Cells, dtype: torch.dtype,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        wanted = ctx.needs_input_grad[5:]
        # Copies, not saved tensors, which the first backward pass would free.
        leaves = [p.detach().double().clone().requires_grad_(w) for p, w in zip(parameters, wanted, strict=True)]
        with torch.set_grad_enabled(any(wanted)):
            cubics = kind.cubics(pick(tables(*leaves), modules), cells).to(dtype)
        ctx.cubics, ctx.leaves, ctx.dtypes = cubics, leaves, [p.dtype for p in parameters]
        return cubics.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        trained = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(ctx.cubics, trained, upstream[0], retain_graph=True, allow_unused=True))
        grads = [next(found) if leaf.requires_grad else None for leaf in ctx.leaves]
        given = (g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, None, None, *given
