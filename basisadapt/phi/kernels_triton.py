"""The fused kernels for a GPU: W + F(BA) in one pass over W, and the pullback in one pass over the dense gradient.

BA is formed tile by tile on the tensor cores and never stored. The degree of the series is read on the GPU, so no
kernel is compiled per degree and the host need not know it. Sums over tiles are stored per program and added in a
fixed order: the result repeats bit for bit. A series comes as one row of numbers (see `evaluators.Series.packed`), and
what is the same everywhere is a constant of the module: every argument costs the host time at each launch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from basisadapt.phi import series as layout
from basisadapt.phi.evaluators import Series

GROUP = tl.constexpr(8)  # degrees per turn of the loops; the coefficients beyond the degree are zero
TERMS = tl.constexpr(layout.POINTS[-1])
SHORT = tl.constexpr(layout.POWER_COUNT)  # up to so many terms in powers, where the result is in half precision
VALUES, SLOPES = tl.constexpr(layout.VALUES), tl.constexpr(layout.SLOPES)
POWERS, SLOPE_POWERS = tl.constexpr(layout.POWERS), tl.constexpr(layout.SLOPE_POWERS)
STEP = tl.constexpr(4)  # of the number of powers
BLOCK_R = 64  # columns of B per product
ROWS_OF_TILES = 8  # per program, which keeps its columns of A
ENOUGH_PROGRAMS = 2048


@triton.jit
def _columns_of(A, cols, n, r, start, BR: tl.constexpr):
    k = start + tl.arange(0, BR)
    return tl.load(
        A + k[:, None].to(tl.int64) * n + cols[None, :], mask=(k < r)[:, None] & (cols < n)[None, :], other=0.0
    )


@triton.jit
def _rows_of(B, rows, m, r, start, BR: tl.constexpr):
    k = start + tl.arange(0, BR)
    return tl.load(
        B + rows[:, None].to(tl.int64) * r + k[None, :], mask=(rows < m)[:, None] & (k < r)[None, :], other=0.0
    )


@triton.jit
def _factor_product(
    A, B, a, rows, cols, m, n, r, scale, BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """t = BA / R on one tile; a: the first BR rows of A there."""
    t = tl.dot(_rows_of(B, rows, m, r, 0, BR) * scale, a, input_precision=PRECISION)
    if not ONE_BLOCK:
        for start in range(BR, r, BR):
            b = _rows_of(B, rows, m, r, start, BR) * scale
            t = tl.dot(b, _columns_of(A, cols, n, r, start, BR), t, input_precision=PRECISION)
    return t


@triton.jit
def _coefficients(place, COUNT: tl.constexpr):
    c = (tl.load(place),)
    for d in tl.static_range(1, COUNT):
        c = c + (tl.load(place + d),)
    return c


@triton.jit
def _horner(t, c, COUNT: tl.constexpr):
    value = tl.zeros_like(t) + c[COUNT - 1]
    for d in tl.static_range(1, COUNT):
        value = value * t + c[COUNT - 1 - d]
    return value


@triton.jit
def _clenshaw(t, values, degree):
    twice = t + t
    one = tl.zeros_like(t)
    two = tl.zeros_like(t)
    groups = (degree + GROUP - 1) // GROUP
    for g in range(groups):
        top = (groups - g) * GROUP - 1
        for d in tl.static_range(GROUP):
            new = twice * one + (tl.load(values + top - d) - two)
            two = one
            one = new
    return one - t * two


@triton.jit
def _form_by(
    COUNT: tl.constexpr, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By COUNT powers of t; 0: by Clenshaw's recurrence, which is exact at any length."""
    degree = tl.load(SERIES).to(tl.int32)
    scale = tl.load(SERIES + 1)
    c = _coefficients(SERIES + POWERS, COUNT)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a = _columns_of(A, cols, n, r, 0, BR)
    for i in tl.range(TILES, num_stages=3):
        rows = (tl.program_id(1) * TILES + i) * ROWS + tl.arange(0, ROWS)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        row = rows[:, None].to(tl.int64)
        t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
        value = _horner(t, c, COUNT) if COUNT else _clenshaw(t, SERIES + VALUES, degree)
        if HAS_WEIGHT:
            place = W + row * stride_m + cols[None, :].to(tl.int64) * stride_n
            value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + row * n + cols[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _form(
    W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W + F(BA)."""
    degree = tl.load(SERIES).to(tl.int32)
    # In powers of t the same polynomial is less exact, by less than half precision sees.
    if (OUT.dtype.element_ty == tl.float32) | (degree > SHORT):
        _form_by(
            0, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT,
            ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION,
        )  # fmt: skip
    elif degree > 3 * STEP:
        _form_by(
            4 * STEP, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT,
            ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION,
        )  # fmt: skip
    elif degree > 2 * STEP:
        _form_by(
            3 * STEP, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT,
            ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _form_by(
            2 * STEP, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT,
            ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION,
        )  # fmt: skip


@triton.jit
def _pull(
    G, A, B, SERIES, SUMS, m, n, r, programs, ABOVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G becomes G F'(z); Σ G T_d(t) of this program's tiles goes to its column of SUMS.

    For series of more than ABOVE terms: the others `_pull_short` has done.
    """
    degree = tl.load(SERIES).to(tl.int32)
    if degree > ABOVE:
        cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        a = _columns_of(A, cols, n, r, 0, BR)
        groups = (degree + GROUP - 1) // GROUP
        scale = tl.load(SERIES + 1)
        in_group = tl.arange(0, GROUP)[None, :]
        group = tl.arange(0, TERMS // GROUP)[:, None]
        moments = tl.zeros((TERMS // GROUP, GROUP), tl.float32)
        for i in range(TILES):
            rows = (tl.program_id(1) * TILES + i) * ROWS + tl.arange(0, ROWS)
            inside = (rows < m)[:, None] & (cols < n)[None, :]
            place = G + rows[:, None].to(tl.int64) * n + cols[None, :]
            gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
            twice = t + t
            one = t  # T_{-1} = T_1, and T_{-2} = T_2
            two = twice * t - 1.0
            slope = tl.zeros_like(t)
            for g in range(groups):
                partial = tl.zeros((ROWS, GROUP), tl.float32)
                for d in tl.static_range(GROUP):
                    new = twice * one - two
                    two = one
                    one = new
                    slope += tl.load(SERIES + SLOPES + g * GROUP + d) * new
                    # Along rows first: a row of the tile lives in one warp.
                    partial += tl.where(in_group == d, tl.sum(gradient * new, axis=1)[:, None], 0.0)
                moments += tl.where(group == g, tl.sum(partial, axis=0)[None, :], 0.0)
            tl.store(place, (gradient * slope).to(G.dtype.element_ty), mask=inside)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(SUMS + (group * GROUP + in_group) * programs + program, moments)


@triton.jit
def _pull_by(
    COUNT: tl.constexpr, G, A, B, SERIES, SUMS, m, n, r, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By COUNT powers of t. Σ G t^k is the sum of products of G t^i, i < STEP, and a power of t^STEP."""
    scale = tl.load(SERIES + 1)
    c = _coefficients(SERIES + SLOPE_POWERS, COUNT)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a = _columns_of(A, cols, n, r, 0, BR)
    sums = (tl.zeros((ROWS,), tl.float32),)
    for _ in tl.static_range(1, COUNT):
        sums = sums + (tl.zeros((ROWS,), tl.float32),)
    for tile in range(TILES):
        rows = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        place = G + rows[:, None].to(tl.int64) * n + cols[None, :]
        g0 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
        tl.store(place, (g0 * _horner(t, c, COUNT)).to(G.dtype.element_ty), mask=inside)
        square = t * t
        g1 = g0 * t
        g2 = g0 * square
        g3 = g1 * square
        factor = square * square
        of_tile = (tl.sum(g0, 1), tl.sum(g1, 1), tl.sum(g2, 1), tl.sum(g3, 1))
        power = factor
        for _ in tl.static_range(1, COUNT // STEP):
            of_tile = of_tile + (
                tl.sum(g0 * power, 1),
                tl.sum(g1 * power, 1),
                tl.sum(g2 * power, 1),
                tl.sum(g3 * power, 1),
            )
            power *= factor
        added = (sums[0] + of_tile[0],)
        for k in tl.static_range(1, COUNT):
            added = added + (sums[k] + of_tile[k],)
        sums = added
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for k in tl.static_range(COUNT):
        tl.store(SUMS + (TERMS + k) * programs + program, tl.sum(sums[k]))


@triton.jit
def _pull_short(
    G, A, B, SERIES, SUMS, m, n, r, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_pull` for at most SHORT terms, and with Σ G t^k instead, behind the moments: half the time.

    In powers of t the same gradient is less exact, by less than half precision sees.
    """
    degree = tl.load(SERIES).to(tl.int32)
    if degree <= 2 * STEP:
        _pull_by(
            2 * STEP, G, A, B, SERIES, SUMS, m, n, r, programs, ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION
        )  # fmt: skip
    elif degree <= 3 * STEP:
        _pull_by(
            3 * STEP, G, A, B, SERIES, SUMS, m, n, r, programs, ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION
        )  # fmt: skip
    elif degree <= SHORT:
        _pull_by(
            4 * STEP, G, A, B, SERIES, SUMS, m, n, r, programs, ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION
        )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """How a kernel covers a matrix: rows and columns of a tile, and warps per program."""

    rows: int
    columns: int
    warps: int


# Few numbers per thread, so that many warps fit.
FORM, PULL, PULL_SHORT = Tiling(16, 128, 4), Tiling(64, 64, 4), Tiling(16, 64, 1)


@functools.cache
def _plan(
    tiling: Tiling, m: int, n: int, r: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int, int], tuple[int, int, int, int, bool, str]]:
    """The grid of programs, and the constants ROWS, COLUMNS, BR, TILES, ONE_BLOCK and PRECISION of a kernel."""
    rows, columns = triton.cdiv(m, tiling.rows), triton.cdiv(n, tiling.columns)
    tiles = ROWS_OF_TILES if rows * columns >= ROWS_OF_TILES * ENOUGH_PROGRAMS else 1
    block = min(BLOCK_R, max(16, triton.next_power_of_2(r)))
    # Three products of halves of the numbers are nearly one in float32; before Ampere there is no such unit.
    precision = "tf32x3" if dtype == torch.float32 else "bf16x3"
    if torch.cuda.get_device_capability(device) < (8, 0):
        precision = "ieee"
    constants = (tiling.rows, tiling.columns, block, tiles, r <= block, precision)
    return (columns, triton.cdiv(rows, tiles), 1), constants


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], warps: int, tensors: tuple[Tensor, ...], *rest: Any) -> None:
    """`kernel[grid](*tensors, *rest, num_warps=warps)`, without looking up again what was compiled for such arguments.

    Triton compiles per dtype, per alignment of pointers and per divisibility of numbers: the key holds all of them. Its
    own look-up takes longer than a small layer's work.
    """
    device = tensors[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, grid, warps, tensors, *rest)
    key = (kernel, device, warps, rest, *((t.dtype, t.data_ptr() % 16 == 0) for t in tensors))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *rest, num_warps=warps)
    else:
        compiled[grid](*tensors, *rest)
    return None


def effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, series: Series, dtype: torch.dtype) -> Tensor:
    """As `kernels.effective_weight`."""
    A, B = A.contiguous(), B.contiguous()
    (r, n), m = A.shape, B.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=A.device)
    grid, constants = _plan(FORM, m, n, r, dtype, A.device)
    W, strides = (out, (n, 1)) if weight is None else (weight, weight.stride())
    _launch(_form, grid, FORM.warps, (W, out, A, B, series.packed), m, n, r, *strides, weight is not None, *constants)
    return out


def pull_back(
    dense: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, series: Series
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """As `kernels.pull_back`; `dense` is overwritten."""
    return effective_weight(weight, A, B, series, dense.dtype), *gradients(dense, A, B, series)


def gradients(dense: Tensor, A: Tensor, B: Tensor, series: Series) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The gradients to A, B and the coefficients; `dense` is overwritten."""
    A, B, dense = A.contiguous(), B.contiguous(), dense.contiguous()
    (r, n), m = A.shape, B.shape[0]
    exact = dense.dtype == torch.float32
    plans = {tiling: _plan(tiling, m, n, r, dense.dtype, A.device) for tiling in (PULL_SHORT, PULL)}
    programs = max(grid[0] * grid[1] for grid, _ in plans.values())
    sums = torch.zeros(TERMS.value + SHORT.value, programs, device=A.device)
    tensors = (dense, A, B, series.packed, sums)
    # Which of the two has work is known on the GPU alone; the other returns at once.
    if not exact:
        grid, constants = plans[PULL_SHORT]
        _launch(_pull_short, grid, PULL_SHORT.warps, tensors, m, n, r, programs, *constants)
    grid, constants = plans[PULL]
    _launch(_pull, grid, PULL.warps, tensors, m, n, r, programs, 0 if exact else SHORT.value, *constants)
    moments = sums.sum(1, dtype=torch.float64) @ layout.to_moments(TERMS.value, A.device)
    if exact:
        grad_a, grad_b = B.T @ dense, dense @ A.T
    else:
        grad_a = torch.mm(B.to(dense.dtype).T, dense, out_dtype=torch.float32)
        grad_b = torch.mm(dense, A.to(dense.dtype).T, out_dtype=torch.float32)
    return grad_a, grad_b, (moments,)
