"""The fused kernels for a GPU: W + F(BA) in one pass over W, and the pullback in one pass over the dense gradient.

BA is formed tile by tile on the tensor cores and never stored. A kernel is compiled for the number of powers that the
host expects a series to need. The kernel reads the number it does need on the GPU; if that is larger, it uses slower
recurrences. Sums over tiles are stored per program and added in a fixed order, so the result is reproducible bit for
bit. A series is one row of numbers (see `evaluators.Series`), and what never changes is a constant of the module: every
argument costs the host time at each launch.
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
from basisadapt.phi.series import Packed

GROUP = tl.constexpr(8)  # degrees per turn of the loops; the coefficients beyond the degree are zero
TERMS = tl.constexpr(layout.POINTS[-1])
POWER_COUNT = tl.constexpr(layout.POWER_COUNT)
DEGREE, SCALE = tl.constexpr(Packed.DEGREE), tl.constexpr(Packed.SCALE)
VALUES, SLOPES = tl.constexpr(Packed.VALUES), tl.constexpr(Packed.SLOPES)
POWERS, SLOPE_POWERS = tl.constexpr(Packed.POWERS), tl.constexpr(Packed.SLOPE_POWERS)
BEYOND = tl.constexpr(1.001)  # of R, and what rounding may add
STEP = tl.constexpr(4)  # powers of t that are kept at once
LANES = tl.constexpr(4)  # threads among which a product's result deals out the columns of a row, in pairs
FEWEST = 6  # powers for which a kernel is compiled; from there in twos
BLOCK_R = 64  # columns of B per product
ROWS_OF_TILES = 8  # per program, which keeps its columns of A
ENOUGH_PROGRAMS = 2048
REGISTERS = 2**16  # of a multiprocessor


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
def _halves(x, PRECISION: tl.constexpr):
    """x as a sum of two bfloat16 numbers; x itself in other precisions."""
    if PRECISION == "bf16x3":
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high = x
        low = x
    return high, low


@triton.jit
def _product(b, a, t, PRECISION: tl.constexpr):
    """t + ba, nearly as in float32; b, a: of `_halves`."""
    if PRECISION == "bf16x3":
        t = tl.dot(b[1], a[0], t)
        t = tl.dot(b[0], a[1], t)
        return tl.dot(b[0], a[0], t)
    else:
        return tl.dot(b[0], a[0], t, input_precision=PRECISION)


@triton.jit
def _factor_product(
    A, B, a, b, rows, cols, m, n, r, scale, BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """t = BA / R on one tile, NaN beyond [−1, 1] (see `evaluators.Evaluator`); a, b: the first BR rows of A and columns
    of B / R there, of `_halves`."""
    t = _product(b, a, tl.zeros((rows.shape[0], cols.shape[0]), tl.float32), PRECISION)
    if not ONE_BLOCK:
        for start in range(BR, r, BR):
            more_b = _halves(_rows_of(B, rows, m, r, start, BR) * scale, PRECISION)
            more_a = _halves(_columns_of(A, cols, n, r, start, BR), PRECISION)
            t = _product(more_b, more_a, t, PRECISION)
    return tl.where(tl.abs(t) <= BEYOND, t, float("nan"))


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
    degree = tl.load(SERIES + DEGREE).to(tl.int32)
    scale = tl.load(SERIES + SCALE)
    c = _coefficients(SERIES + POWERS, COUNT)
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a = _halves(_columns_of(A, cols, n, r, 0, BR), PRECISION)
    for i in tl.range(TILES, num_stages=3):
        rows = (tl.program_id(1) * TILES + i) * ROWS + tl.arange(0, ROWS)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        row = rows[:, None].to(tl.int64)
        b = _halves(_rows_of(B, rows, m, r, 0, BR) * scale, PRECISION)
        t = _factor_product(A, B, a, b, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
        value = _horner(t, c, COUNT) if COUNT else _clenshaw(t, SERIES + VALUES, degree)
        if HAS_WEIGHT:
            place = W + row * stride_m + cols[None, :].to(tl.int64) * stride_n
            value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + row * n + cols[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _form(
    W, OUT, A, B, SERIES, AFTER, m, n, r, stride_m, stride_n, COUNT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W + F(BA). AFTER is not read: it tells a graph that this is done after that tensor, and not kept until then."""
    if tl.load(SERIES + DEGREE).to(tl.int32) <= COUNT:
        _form_by(
            COUNT, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT,
            ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _form_by(
            0, W, OUT, A, B, SERIES, m, n, r, stride_m, stride_n, HAS_WEIGHT,
            ROWS, COLUMNS, BR, TILES, ONE_BLOCK, PRECISION,
        )  # fmt: skip


@triton.jit
def _pieces(g, t, HALVINGS: tl.constexpr):
    """g and t, joined, cut into 2^HALVINGS pieces of LANES columns: first even from odd columns, then left from right
    halves. Every thread holds an equal part of each piece, so no data moves between threads."""
    both = tl.join(g, t)
    pieces = tl.split(tl.permute(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2, 2)), (0, 1, 3, 2)))
    for depth in tl.static_range(1, HALVINGS):
        finer = ()
        for i in tl.static_range(2**depth):
            piece = pieces[i]
            halves = tl.reshape(piece, (piece.shape[0], 2, piece.shape[1] // 2, 2))
            finer = finer + tl.split(tl.permute(halves, (0, 2, 3, 1)))
        pieces = finer
    return pieces


@triton.jit
def _power_sums(sums, g0, t, COUNT: tl.constexpr):
    """sums + G t^k for k < COUNT: each a product of G t^i, i < STEP, and a power of t^STEP. Element by element: one
    fused multiply-add each, and no exchange between threads."""
    square = t * t
    g1 = g0 * t
    g = (g0, g1, g0 * square, g1 * square)
    factor = square * square
    power = factor
    found = (sums[0] + g0,)
    for k in tl.static_range(1, COUNT):
        if k < STEP:
            found = found + (sums[k] + g[k],)
        else:
            if k > STEP and k % STEP == 0:
                power *= factor
            found = found + (sums[k] + g[k % STEP] * power,)
    return found


@triton.jit
def _moments(moments, gradient, t, degree, group, in_group):
    """moments + Σ G T_d(t), by the recurrence of T."""
    twice = t + t
    one = t  # T_{-1} = T_1, and T_{-2} = T_2
    two = twice * t - 1.0
    for g in range((degree + GROUP - 1) // GROUP):
        partial = tl.zeros((t.shape[0], GROUP), tl.float32)
        for d in tl.static_range(GROUP):
            new = twice * one - two
            two = one
            one = new
            partial += tl.where(in_group == d, tl.sum(gradient * new, axis=1)[:, None], 0.0)
        moments += tl.where(group == g, tl.sum(partial, axis=0)[None, :], 0.0)
    return moments


@triton.jit
def _pull_by(
    COUNT: tl.constexpr, G, A, B, SERIES, SCRATCH, m, n, r, tiles, each, programs, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By COUNT powers of t; 0: by recurrences."""
    degree = tl.load(SERIES + DEGREE).to(tl.int32)
    scale = tl.load(SERIES + SCALE)
    slopes = _coefficients(SERIES + SLOPE_POWERS, COUNT)
    in_group = tl.arange(0, GROUP)[None, :]
    group = tl.arange(0, TERMS // GROUP)[:, None]
    moments = tl.zeros((TERMS // GROUP, GROUP), tl.float32)
    sums = (tl.zeros((ROWS, LANES), tl.float32),)
    for _ in tl.static_range(1, COUNT):
        sums = sums + (tl.zeros((ROWS, LANES), tl.float32),)
    program = tl.program_id(0)
    first = program * each
    end = tl.minimum(first + each, tl.cdiv(m, ROWS) * tiles)
    for block in range(first // tiles, tl.cdiv(end, tiles)):
        rows = block * ROWS + tl.arange(0, ROWS)
        row = rows[:, None].to(tl.int64)
        b = _halves(_rows_of(B, rows, m, r, 0, BR) * scale, PRECISION)
        grad_b = tl.zeros((ROWS, BR), tl.float32)
        for i in tl.range(tl.maximum(first, block * tiles), tl.minimum(end, (block + 1) * tiles), num_stages=3):
            cols = (i - block * tiles) * COLUMNS + tl.arange(0, COLUMNS)
            inside = (rows < m)[:, None] & (cols < n)[None, :]
            place = row * n + cols[None, :]
            gradient = tl.load(G + place, mask=inside, other=0.0).to(tl.float32)
            a = _columns_of(A, cols, n, r, 0, BR)
            t = _factor_product(A, B, _halves(a, PRECISION), b, rows, cols, m, n, r, scale, BR, ONE_BLOCK, PRECISION)
            slope = _horner(t, slopes, COUNT) if COUNT else _clenshaw(t, SERIES + SLOPES, degree)
            pulled = (gradient * slope).to(G.dtype.element_ty)
            tl.store(G + place, pulled, mask=inside)
            if ONE_BLOCK:
                grad_b = tl.dot(pulled, tl.trans(a.to(G.dtype.element_ty)), grad_b, input_precision=PRECISION)
            if COUNT:
                pieces = _pieces(gradient, t, HALVINGS)
                for piece in tl.static_range(2**HALVINGS):
                    g, position = tl.split(pieces[piece])
                    sums = _power_sums(sums, g, position, COUNT)
            else:
                moments = _moments(moments, gradient, t, degree, group, in_group)
        if ONE_BLOCK:
            k = tl.arange(0, BR)[None, :]
            part = program - block * tiles // each
            parts = SCRATCH + (TERMS + POWER_COUNT) * programs
            tl.store(parts + (part.to(tl.int64) * m + row) * r + k, grad_b, mask=(rows < m)[:, None] & (k < r))
    if COUNT:
        for d in tl.static_range(COUNT):
            tl.store(SCRATCH + (TERMS + d) * programs + program, tl.sum(tl.sum(sums[d], 1), 0))
    else:
        tl.store(SCRATCH + (group * GROUP + in_group) * programs + program, moments)


@triton.jit(do_not_specialize=["tiles", "each", "programs"])
def _pull(
    G, A, B, SERIES, SCRATCH, m, n, r, tiles, each, programs, COUNT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """On `each` of the tiles, counted row by row, `tiles` to a row: G becomes G F'(z); the scratch receives the sums
    Σ G T_d(t) or, behind them, Σ G t^k, and, where r fits into one block, the parts of dB = (G F'(z)) Aᵀ."""
    if tl.load(SERIES + DEGREE).to(tl.int32) <= COUNT:
        _pull_by(
            COUNT, G, A, B, SERIES, SCRATCH, m, n, r, tiles, each, programs, ROWS, COLUMNS, BR, ONE_BLOCK, PRECISION
        )  # fmt: skip
    else:
        _pull_by(
            0, G, A, B, SERIES, SCRATCH, m, n, r, tiles, each, programs, ROWS, COLUMNS, BR, ONE_BLOCK, PRECISION
        )  # fmt: skip


@triton.jit(do_not_specialize=["size", "tiles", "each", "programs", "parts"])
def _collect(
    SERIES, SCRATCH, MOMENTS, GRAD_B, size, tiles, each, programs, parts, COUNT: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up what the programs of `_pull` have left, in a fixed order; size: of dB, SHARE: of a row of tiles in it."""
    index = tl.program_id(0)
    if index < TERMS + POWER_COUNT:
        degree = tl.load(SERIES + DEGREE).to(tl.int32)
        short = (index >= TERMS) & (index < TERMS + degree)
        made = tl.where(degree <= COUNT, short, (index < TERMS) & (index < degree))
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, tl.where(made, programs, 0), BLOCK):
            place = start + tl.arange(0, BLOCK)
            found = tl.load(SCRATCH + index * programs + place, mask=place < programs, other=0.0)
            total += found.to(tl.float64)
        tl.store(MOMENTS + index, tl.sum(total, 0))
    else:
        place = (index - TERMS - POWER_COUNT) * BLOCK + tl.arange(0, BLOCK)
        block = place // SHARE
        of_block = ((block + 1) * tiles - 1) // each - block * tiles // each
        source = SCRATCH + (TERMS + POWER_COUNT) * programs + place
        summed = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            summed += tl.load(source, mask=(place < size) & (part <= of_block), other=0.0)
            source += size
        tl.store(GRAD_B + place, summed, mask=place < size)


@dataclass(frozen=True)
class Tiling:
    """How a kernel covers a matrix: rows and columns of a tile, warps per program, and registers per thread."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None

    def resident(self, device: torch.device) -> int:
        """The number of programs that fit on the device at once, by their registers."""
        multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
        return multiprocessors * (REGISTERS // (32 * self.warps * (self.registers or 255)))


FORM, PULL, COLLECT = Tiling(16, 128, 4), Tiling(64, 64, 4, registers=255), Tiling(1, 1024, 4)
HALVINGS = tl.constexpr((PULL.columns // LANES.value).bit_length() - 1)
SUMS = TERMS.value + POWER_COUNT.value  # numbers that a program of `_pull` leaves


def _count(series: Series, dtype: torch.dtype) -> int:
    """The number of powers by which a series is evaluated; 0 for recurrences, which are accurate at any length.

    Powers are less accurate, by less than the rounding of half precision. The number follows from the degree that the
    host read last; a kernel that finds more terms on the GPU uses recurrences.
    """
    if dtype == torch.float32 or series.expected > POWER_COUNT.value:
        return 0
    return max(FEWEST, series.expected + series.expected % 2)


def product_constants(r: int, dtype: torch.dtype, device: torch.device) -> tuple[int, bool, str]:
    """BR, ONE_BLOCK and PRECISION of a kernel."""
    block = min(BLOCK_R, max(16, triton.next_power_of_2(r)))
    # Three products of halves of the numbers are nearly one in float32; before Ampere there is no such unit.
    precision = "tf32x3" if dtype == torch.float32 else "bf16x3"
    if torch.cuda.get_device_capability(device) < (8, 0):
        precision = "ieee"
    return block, r <= block, precision


@functools.cache
def _form_plan(m: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The grid of programs of `_form`, and its constants from ROWS on."""
    rows, columns = triton.cdiv(m, FORM.rows), triton.cdiv(n, FORM.columns)
    tiles = ROWS_OF_TILES if rows * columns >= ROWS_OF_TILES * ENOUGH_PROGRAMS else 1
    block, one_block, precision = product_constants(r, dtype, device)
    return (columns, triton.cdiv(rows, tiles), 1), (FORM.rows, FORM.columns, block, tiles, one_block, precision)


@functools.cache
def _pull_plan(
    m: int, n: int, r: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int, tuple[Any, ...]]:
    """Tiles in a row of `_pull`, tiles per program, programs, and its constants from ROWS on.

    The programs all fit on the device at once and have equal numbers of tiles, so that none waits for another to end.
    """
    tiles = triton.cdiv(n, PULL.columns)
    total = triton.cdiv(m, PULL.rows) * tiles
    each = triton.cdiv(total, PULL.resident(device))
    return tiles, each, triton.cdiv(total, each), (PULL.rows, PULL.columns, *product_constants(r, dtype, device))


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, int, int], tiling: Tiling, tensors: tuple[Tensor, ...], *rest: Any) -> None:
    """`kernel[grid](*tensors, *rest)`, with a faster look-up of the compiled kernel.

    Triton compiles for each dtype, alignment of pointers and divisibility of numbers; the key holds them all. Its own
    look-up takes longer than a small layer's work.
    """
    device = tensors[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tiling, tensors, *rest)
    key = (kernel, device, rest, *((t.dtype, t.data_ptr() % 16 == 0) for t in tensors))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *rest, num_warps=tiling.warps, maxnreg=tiling.registers)
    else:
        compiled[grid](*tensors, *rest)
    return None


def effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, series: Series, dtype: torch.dtype) -> Tensor:
    """As `kernels.effective_weight`."""
    A, B = A.contiguous(), B.contiguous()
    (r, n), m = A.shape, B.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=A.device)
    grid, constants = _form_plan(m, n, r, dtype, A.device)
    W, strides = (out, (n, 1)) if weight is None else (weight, weight.stride())
    launch(
        _form, grid, FORM, (W, out, A, B, series.packed, out), m, n, r, *strides, _count(series, dtype),
        weight is not None, *constants,
    )  # fmt: skip
    return out


def pull_back(dense: Tensor, A: Tensor, B: Tensor, series: Series) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The gradients to A, B and the series' coefficients; `dense` is overwritten."""
    A, B, dense = A.contiguous(), B.contiguous(), dense.contiguous()
    (r, n), m = A.shape, B.shape[0]
    tiles, each, programs, constants = _pull_plan(m, n, r, dense.dtype, A.device)
    count, size = _count(series, dense.dtype), m * r if constants[3] else 0
    parts = (tiles - 2) // each + 2  # programs that have tiles of one row, at most
    scratch = A.new_empty(SUMS * programs + parts * size)
    moments, grad_b = series.parameters[0].new_empty(SUMS), torch.empty_like(B)
    tensors = (dense, A, B, series.packed, scratch)
    launch(_pull, (programs, 1, 1), PULL, tensors, m, n, r, tiles, each, programs, count, *constants)
    # triton.cdiv takes microseconds.
    launch(
        _collect, (SUMS + -(-size // COLLECT.columns), 1, 1), COLLECT,
        (series.packed, scratch, moments, grad_b), size, tiles, each, programs, parts, count, PULL.rows * r,
        COLLECT.columns,
    )  # fmt: skip
    grad_a = product_in_float32(B.T, dense)
    if not size:
        grad_b = product_in_float32(dense, A.T)
    return grad_a, grad_b, (moments,)


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """left · right in float32, for matrices of two dtypes: both are first converted to the narrower one."""
    narrow = left.dtype if left.element_size() < right.element_size() else right.dtype
    if narrow == torch.float32:
        return left @ right
    return torch.mm(left.to(narrow), right.to(narrow), out_dtype=torch.float32)
