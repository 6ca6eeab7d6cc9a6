"""The fused kernels for a GPU: W + F(BA) in one pass over W, and the pullback in one pass over the dense gradient.

BA is formed tile by tile on the tensor cores and never stored. The degree of the series is read on the GPU, so no
kernel is compiled per degree and the host need not know it. Sums over tiles are stored per program and added in a
fixed order: the result repeats bit for bit. A series comes as one row of numbers (see `evaluators.Series.packed`), and
what is the same everywhere is a constant of the module: every argument costs the host time at each launch.
"""

from __future__ import annotations

import functools
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
# Rows and columns of a tile: few numbers per thread, so that many warps fit.
FORM_ROWS, FORM_COLUMNS = tl.constexpr(16), tl.constexpr(128)
PULL_ROWS, PULL_COLUMNS = tl.constexpr(64), tl.constexpr(64)
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
def _horner(t, powers, COUNT: tl.constexpr):
    value = tl.zeros_like(t) + tl.load(powers + COUNT - 1)
    for d in tl.static_range(1, COUNT):
        value = value * t + tl.load(powers + (COUNT - 1 - d))
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
def _form(
    W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n,
    HAS_WEIGHT: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * FORM_COLUMNS + tl.arange(0, FORM_COLUMNS)
    a = _columns_of(A, cols, n, r, 0, BR)
    degree = tl.load(SERIES).to(tl.int32)
    scale = tl.load(SERIES + 1)
    for i in tl.range(TILES, num_stages=2):
        rows = (tl.program_id(1) * TILES + i) * FORM_ROWS + tl.arange(0, FORM_ROWS)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        row = rows[:, None].to(tl.int64)
        t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
        if OUT.dtype.element_ty == tl.float32:
            value = _clenshaw(t, SERIES + VALUES, degree)
        # In powers of t the same polynomial is less exact, by less than half precision sees.
        elif degree <= GROUP:
            value = _horner(t, SERIES + POWERS, GROUP)
        elif degree <= SHORT:
            value = _horner(t, SERIES + POWERS, SHORT)
        else:
            value = _clenshaw(t, SERIES + VALUES, degree)
        if HAS_WEIGHT:
            place = W + row * stride_m + cols[None, :].to(tl.int64) * stride_n
            value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + row * n + cols[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _pull(
    G, A, B, SERIES, MOMENTS, m, n, r, ABOVE: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G becomes G F'(z); Σ G T_d(t) of this program's tiles goes to its row of MOMENTS.

    For series of more than ABOVE terms: the others `_pull_short` has done.
    """
    degree = tl.load(SERIES).to(tl.int32)
    if degree > ABOVE:
        cols = tl.program_id(0) * PULL_COLUMNS + tl.arange(0, PULL_COLUMNS)
        a = _columns_of(A, cols, n, r, 0, BR)
        groups = (degree + GROUP - 1) // GROUP
        scale = tl.load(SERIES + 1)
        in_group = tl.arange(0, GROUP)[None, :]
        group = tl.arange(0, TERMS // GROUP)[:, None]
        moments = tl.zeros((TERMS // GROUP, GROUP), tl.float32)
        for i in range(TILES):
            rows = (tl.program_id(1) * TILES + i) * PULL_ROWS + tl.arange(0, PULL_ROWS)
            inside = (rows < m)[:, None] & (cols < n)[None, :]
            place = G + rows[:, None].to(tl.int64) * n + cols[None, :]
            gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
            twice = t + t
            one = t  # T_{-1} = T_1, and T_{-2} = T_2
            two = twice * t - 1.0
            slope = tl.zeros_like(t)
            for g in range(groups):
                partial = tl.zeros((PULL_ROWS, GROUP), tl.float32)
                for d in tl.static_range(GROUP):
                    new = twice * one - two
                    two = one
                    one = new
                    slope += tl.load(SERIES + SLOPES + g * GROUP + d) * new
                    # Along rows first: a row of the tile lives in one warp.
                    partial += tl.where(in_group == d, tl.sum(gradient * new, axis=1)[:, None], 0.0)
                moments += tl.where(group == g, tl.sum(partial, axis=0)[None, :], 0.0)
            tl.store(place, (gradient * slope).to(G.dtype.element_ty), mask=inside)
        program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        tl.store(MOMENTS + program * (TERMS + SHORT) + group * GROUP + in_group, moments)


@triton.jit
def _eight_powers(power, t, s0, s1, s2, s3, s4, s5, s6, s7):
    """Sums along rows of power, power · t, .., added to those of earlier tiles; and power · t⁸."""
    s0 += tl.sum(power, axis=1)
    power *= t
    s1 += tl.sum(power, axis=1)
    power *= t
    s2 += tl.sum(power, axis=1)
    power *= t
    s3 += tl.sum(power, axis=1)
    power *= t
    s4 += tl.sum(power, axis=1)
    power *= t
    s5 += tl.sum(power, axis=1)
    power *= t
    s6 += tl.sum(power, axis=1)
    power *= t
    s7 += tl.sum(power, axis=1)
    return power * t, s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def _store_eight(place, s0, s1, s2, s3, s4, s5, s6, s7):
    tl.store(place, tl.sum(s0))
    tl.store(place + 1, tl.sum(s1))
    tl.store(place + 2, tl.sum(s2))
    tl.store(place + 3, tl.sum(s3))
    tl.store(place + 4, tl.sum(s4))
    tl.store(place + 5, tl.sum(s5))
    tl.store(place + 6, tl.sum(s6))
    tl.store(place + 7, tl.sum(s7))


@triton.jit
def _pull_short(
    G, A, B, SERIES, MOMENTS, m, n, r,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_pull` for at most SHORT terms, and with Σ G t^k instead, behind the moments: half the work per term.

    In powers of t the same gradient is less exact, by less than half precision sees.
    """
    degree = tl.load(SERIES).to(tl.int32)
    if degree <= SHORT:
        cols = tl.program_id(0) * PULL_COLUMNS + tl.arange(0, PULL_COLUMNS)
        a = _columns_of(A, cols, n, r, 0, BR)
        scale = tl.load(SERIES + 1)
        nothing = tl.zeros((PULL_ROWS,), tl.float32)
        s0, s1, s2, s3, s4, s5, s6, s7 = nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing
        u0, u1, u2, u3, u4, u5, u6, u7 = nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing
        for i in range(TILES):
            rows = (tl.program_id(1) * TILES + i) * PULL_ROWS + tl.arange(0, PULL_ROWS)
            inside = (rows < m)[:, None] & (cols < n)[None, :]
            place = G + rows[:, None].to(tl.int64) * n + cols[None, :]
            gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
            power, s0, s1, s2, s3, s4, s5, s6, s7 = _eight_powers(gradient, t, s0, s1, s2, s3, s4, s5, s6, s7)
            if degree <= GROUP:
                slope = _horner(t, SERIES + SLOPE_POWERS, GROUP)
            else:
                power, u0, u1, u2, u3, u4, u5, u6, u7 = _eight_powers(power, t, u0, u1, u2, u3, u4, u5, u6, u7)
                slope = _horner(t, SERIES + SLOPE_POWERS, SHORT)
            tl.store(place, (gradient * slope).to(G.dtype.element_ty), mask=inside)
        program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        behind = MOMENTS + program * (TERMS + SHORT) + TERMS
        _store_eight(behind, s0, s1, s2, s3, s4, s5, s6, s7)
        _store_eight(behind + GROUP, u0, u1, u2, u3, u4, u5, u6, u7)


@functools.cache
def _plan(
    m: int, n: int, r: int, tile: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int, int], tuple[int, int, bool, str]]:
    """The grid of programs, and the constants BR, TILES, ONE_BLOCK and PRECISION of a kernel."""
    rows, columns = triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1])
    tiles = ROWS_OF_TILES if rows * columns >= ROWS_OF_TILES * ENOUGH_PROGRAMS else 1
    block = min(BLOCK_R, max(16, triton.next_power_of_2(r)))
    # Three products of halves of the numbers are nearly one in float32; before Ampere there is no such unit.
    precision = "tf32x3" if dtype == torch.float32 else "bf16x3"
    if torch.cuda.get_device_capability(device) < (8, 0):
        precision = "ieee"
    return (columns, triton.cdiv(rows, tiles), 1), (block, tiles, r <= block, precision)


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], *rest: Any) -> None:
    """`kernel[grid](*tensors, *rest)`, without looking up again what was compiled for such arguments.

    Triton compiles per dtype, per alignment of pointers and per divisibility of numbers: the key holds all of them. Its
    own look-up takes longer than a small layer's work.
    """
    device = tensors[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, grid, tensors, *rest)
    key = (kernel, device, rest, *((t.dtype, t.data_ptr() % 16 == 0) for t in tensors))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *rest)
    else:
        compiled[grid](*tensors, *rest)
    return None


def effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, series: Series, dtype: torch.dtype) -> Tensor:
    """As `kernels.effective_weight`."""
    A, B = A.contiguous(), B.contiguous()
    (r, n), m = A.shape, B.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=A.device)
    grid, constants = _plan(m, n, r, (FORM_ROWS.value, FORM_COLUMNS.value), dtype, A.device)
    W, strides = (out, (n, 1)) if weight is None else (weight, weight.stride())
    _launch(_form, grid, (W, out, A, B, series.packed), m, n, r, *strides, weight is not None, *constants)
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
    grid, constants = _plan(m, n, r, (PULL_ROWS.value, PULL_COLUMNS.value), dense.dtype, A.device)
    sums = torch.zeros(grid[0] * grid[1], TERMS.value + SHORT.value, device=A.device)
    exact = dense.dtype == torch.float32
    # Which of the two has work is known on the GPU alone; the other returns at once.
    if not exact:
        _launch(_pull_short, grid, (dense, A, B, series.packed, sums), m, n, r, *constants)
    _launch(_pull, grid, (dense, A, B, series.packed, sums), m, n, r, 0 if exact else SHORT.value, *constants)
    moments = sums.sum(0, dtype=torch.float64) @ layout.to_moments(TERMS.value, A.device)
    if exact:
        grad_a, grad_b = B.T @ dense, dense @ A.T
    else:
        grad_a = torch.mm(B.to(dense.dtype).T, dense, out_dtype=torch.float32)
        grad_b = torch.mm(dense, A.to(dense.dtype).T, out_dtype=torch.float32)
    return grad_a, grad_b, (moments,)
