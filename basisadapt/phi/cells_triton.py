"""The fused kernels for tables: every entry of BA gathers the cubic of its cell.

The gradient to a table, Σ G s^k over the entries of each cell, is a sum of integers, which does not depend on their
order, so the result is reproducible bit for bit. Atomic additions to one cell wait for each other, so a small table has
several copies of its sums. All numbers that an entry reads or adds to lie in one cache sector.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from basisadapt.phi import cubics, kernels_triton
from basisadapt.phi.cubics import PackedRow, Row
from basisadapt.phi.kernels_triton import Tiling

# Names of functions for a GPU have to be the module's own.
_columns_of, _rows_of, _halves = kernels_triton._columns_of, kernels_triton._rows_of, kernels_triton._halves
_factor_product = kernels_triton._factor_product

# Inductor copies a kernel's constants by their names, with those of the kernels that it calls: no name is used in both.
AT_SCALE, AT_REACH = tl.constexpr(PackedRow.SCALE), tl.constexpr(PackedRow.REACH)
AT_PATH, AT_INVERSE = tl.constexpr(PackedRow.PATH), tl.constexpr(PackedRow.INVERSE)
AT_SLOPE, AT_HALF = tl.constexpr(PackedRow.SLOPE), tl.constexpr(PackedRow.HALF)
FIXED_POINT = tl.constexpr(float(cubics.FIXED_POINT))  # units of the largest gradient
TINY = tl.constexpr(1e-27)  # the least size of the largest gradient, whose unit float32 can still represent
CELLS = 1 << 15  # cells of a table times copies of its sums, at most, unless the table alone has more
FORM, PULL, COLLECT = Tiling(16, 128, 4), Tiling(16, 64, 4), Tiling(1, 1024, 4)


@triton.jit
def _two(pair):
    """The two float32 that lie side by side in 64 bits."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _gather(PAIRS, place, most):
    """The index of each place's cell, the place in it, and the cell's cubic.

    place: in cells, counted from BA = 0; most: the cells on either side of it.
    """
    near = tl.where(tl.abs(place) <= most, place, tl.where(place > 0, most, -most))
    start = tl.floor(near)
    cell = (start + most).to(tl.int32)
    first, second = tl.split(tl.load(PAIRS + (2 * cell)[:, :, None] + tl.arange(0, 2)[None, None, :]))
    p0, p1 = _two(first)
    p2, p3 = _two(second)
    return cell, near - start, p0, p1, p2, p3


@triton.jit
def _form(
    W, OUT, A, B, PAIRS, PACKED, AFTER, m, n, r, stride_m, stride_n, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W + F(BA). AFTER: see `kernels_triton._form`."""
    scale = tl.load(PACKED + AT_SCALE)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    row = rows[:, None].to(tl.int64)
    a = _halves(_columns_of(A, cols, n, r, 0, BR), PRECISION)
    b = _halves(_rows_of(B, rows, m, r, 0, BR) * scale, PRECISION)
    t = _factor_product(A, B, a, b, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
    _, s, p0, p1, p2, p3 = _gather(PAIRS, t * tl.load(PACKED + AT_REACH), tl.load(PACKED + AT_HALF))
    value = ((p3 * s + p2) * s + p1) * s + p0 + t * tl.load(PACKED + AT_PATH)  # t: NaN stays NaN
    if HAS_WEIGHT:
        place = W + row * stride_m + cols[None, :].to(tl.int64) * stride_n
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * n + cols[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "copies"])
def _pull(
    G, A, B, PAIRS, PACKED, LARGEST, SUMS, m, n, r, size, copies, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G becomes G F'(BA), and the sums receive Σ G s^k of every cell, in units; size: numbers in one of the copies."""
    scale = tl.load(PACKED + AT_SCALE)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    place = G + rows[:, None].to(tl.int64) * n + cols[None, :]
    gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    a = _halves(_columns_of(A, cols, n, r, 0, BR), PRECISION)
    b = _halves(_rows_of(B, rows, m, r, 0, BR) * scale, PRECISION)
    t = _factor_product(A, B, a, b, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
    cell, s, _, p1, p2, p3 = _gather(PAIRS, t * tl.load(PACKED + AT_REACH), tl.load(PACKED + AT_HALF))
    slope = ((3.0 * p3 * s + 2.0 * p2) * s + p1) * tl.load(PACKED + AT_INVERSE) + tl.load(PACKED + AT_SLOPE)
    pulled = gradient * tl.where(t == t, slope, float("nan"))
    tl.store(place, pulled.to(G.dtype.element_ty), mask=inside)
    unit = FIXED_POINT / tl.maximum(tl.load(LARGEST).to(tl.float32), TINY)
    power = tl.arange(0, 4)[None, None, :]
    s = s[:, :, None]
    powers = tl.where(power == 0, 1.0, tl.where(power == 1, s, tl.where(power == 2, s * s, s * s * s)))
    weighted = (gradient * unit)[:, :, None] * powers
    whole = tl.floor(tl.where(weighted == weighted, weighted, 0.0) + 0.5).to(tl.int64)
    copy = (tl.program_id(0) + tl.program_id(1)) % copies
    target = SUMS + copy.to(tl.int64) * size + (4 * cell)[:, :, None] + power
    tl.atomic_add(target, whole, mask=inside[:, :, None] & (whole != 0), sem="relaxed")


@triton.jit(do_not_specialize=["size"])
def _collect(SUMS, LARGEST, GRADIENT, size, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the copies of the sums, and converts them from integer units."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for copy in range(COPIES):
        total += tl.load(SUMS + copy * size + place, mask=place < size, other=0)
    unit = tl.maximum(tl.load(LARGEST).to(tl.float32), TINY) / FIXED_POINT
    tl.store(GRADIENT + place, total.to(tl.float32) * unit, mask=place < size)


@functools.cache
def _plan(m: int, n: int, r: int, device: torch.device, tiling: Tiling) -> tuple[Any, ...]:
    """A kernel's grid, and its constants from ROWS on.

    BA is nearly as accurate as in float32, whatever the weights' dtype: a table has too many cells for less.
    """
    block, one_block, precision = kernels_triton.product_constants(r, torch.float32, device)
    grid = triton.cdiv(n, tiling.columns), triton.cdiv(m, tiling.rows), 1
    return grid, (tiling.rows, tiling.columns, block, one_block, precision)


def _copies(cells: int) -> int:
    """The number of copies of the sums, a power of two."""
    return 1 << (max(1, CELLS // cells).bit_length() - 1)


def effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, table: Row, dtype: torch.dtype) -> Tensor:
    """As `kernels.effective_weight`."""
    A, B = A.contiguous(), B.contiguous()
    (r, n), m = A.shape, B.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=A.device)
    grid, constants = _plan(m, n, r, A.device, FORM)
    W, strides = (out, (n, 1)) if weight is None else (weight, weight.stride())
    kernels_triton.launch(
        _form, grid, FORM, (W, out, A, B, table.pairs, table.packed, out), m, n, r, *strides,
        weight is not None, *constants,
    )  # fmt: skip
    return out


def pull_back(dense: Tensor, A: Tensor, B: Tensor, table: Row) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The gradients to A, B and the table's cubics; `dense` is overwritten."""
    A, B, dense = A.contiguous(), B.contiguous(), dense.contiguous()
    (r, n), m = A.shape, B.shape[0]
    grid, constants = _plan(m, n, r, A.device, PULL)
    size, copies = 4 * table.cells, _copies(table.cells)
    largest = torch.linalg.vector_norm(dense, torch.inf)
    sums = torch.zeros(copies * size, dtype=torch.int64, device=A.device)
    of_cubics = torch.empty_like(table.parameters[0])
    kernels_triton.launch(
        _pull, grid, PULL, (dense, A, B, table.pairs, table.packed, largest, sums), m, n, r, size, copies,
        *constants,
    )  # fmt: skip
    kernels_triton.launch(
        _collect, (-(-size // COLLECT.columns), 1, 1), COLLECT, (sums, largest, of_cubics), size, copies,
        COLLECT.columns,
    )  # fmt: skip
    product = kernels_triton.product_in_float32
    return product(B.T, dense), product(dense, A.T), (of_cubics,)
