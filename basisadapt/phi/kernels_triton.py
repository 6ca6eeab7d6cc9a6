"""The fused kernels for a GPU: W + F(BA) in one pass over W, and the pullback in one pass over the dense gradient.

BA is formed tile by tile on the tensor cores and never stored. The degree of the series is read on the GPU, so no
kernel is compiled per degree and the host need not know it. Sums over tiles are stored per program and added in a
fixed order: the result repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from basisadapt.phi.evaluators import Series

GROUP = 8  # degrees per turn of the loops, whose coefficients beyond the degree are zero
BLOCK_R = 64  # columns of B per product
FORM_TILE, PULL_TILE = (16, 128), (64, 32)  # rows and columns: few numbers per thread, so that many warps fit
ROWS_OF_TILES = 8  # per program, which keeps its columns of A
ENOUGH_PROGRAMS = 2048


@triton.jit
def _factor_product(
    A, B, a_first, rows, cols, m, n, r, inverse_radius,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t = BA / R on one tile; a_first: the first BR rows of A there."""
    k = tl.arange(0, BR)
    in_rows = (rows < m)[:, None]
    b = tl.load(B + rows[:, None].to(tl.int64) * r + k[None, :], mask=in_rows & (k < r)[None, :], other=0.0)
    t = tl.dot(b * inverse_radius, a_first, input_precision=PRECISION)
    if not ONE_BLOCK:
        for start in range(BR, r, BR):
            k = start + tl.arange(0, BR)
            a = tl.load(
                A + k[:, None].to(tl.int64) * n + cols[None, :], mask=(k < r)[:, None] & (cols < n)[None, :], other=0.0
            )
            b = tl.load(B + rows[:, None].to(tl.int64) * r + k[None, :], mask=in_rows & (k < r)[None, :], other=0.0)
            t = tl.dot(b * inverse_radius, a, t, input_precision=PRECISION)
    return t


@triton.jit
def _horner(t, powers, COUNT: tl.constexpr):
    value = tl.zeros_like(t) + tl.load(powers + COUNT - 1)
    for d in tl.static_range(1, COUNT):
        value = value * t + tl.load(powers + (COUNT - 1 - d))
    return value


@triton.jit
def _clenshaw(t, values, degree, GROUP: tl.constexpr):
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


@triton.jit(do_not_specialize_on_alignment=["degree", "inverse_radius"])
def _form(
    W, OUT, A, B, values, powers, degree, inverse_radius, m, n, r, stride_m, stride_n,
    HAS_WEIGHT: tl.constexpr, HORNER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BR)
    a = tl.load(A + k[:, None].to(tl.int64) * n + cols[None, :], mask=(k < r)[:, None] & (cols < n)[None, :], other=0.0)
    degree = tl.load(degree)
    scale = tl.load(inverse_radius)
    for i in tl.range(TILES, num_stages=2):
        rows = (tl.program_id(1) * TILES + i) * BM + tl.arange(0, BM)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        row = rows[:, None].to(tl.int64)
        t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BM, BN, BR, ONE_BLOCK, PRECISION)
        if HORNER:
            if degree <= GROUP:
                value = _horner(t, powers, GROUP)
            elif degree <= 2 * GROUP:
                value = _horner(t, powers, 2 * GROUP)
            else:
                value = _clenshaw(t, values, degree, GROUP)
        else:
            value = _clenshaw(t, values, degree, GROUP)
        if HAS_WEIGHT:
            value += tl.load(W + row * stride_m + cols[None, :].to(tl.int64) * stride_n, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(OUT + row * n + cols[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["degree", "inverse_radius"])
def _pull(
    G, A, B, slopes, degree, inverse_radius, MOMENTS, m, n, r,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """G becomes G F'(z); Σ G T_d(t) of this program's tiles goes to its row of MOMENTS."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BR)
    a = tl.load(A + k[:, None].to(tl.int64) * n + cols[None, :], mask=(k < r)[:, None] & (cols < n)[None, :], other=0.0)
    groups = (tl.load(degree) + GROUP - 1) // GROUP
    scale = tl.load(inverse_radius)
    in_group = tl.arange(0, GROUP)[None, :]
    moments = tl.zeros((GROUPS, GROUP), tl.float32)
    for i in range(TILES):
        rows = (tl.program_id(1) * TILES + i) * BM + tl.arange(0, BM)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        place = G + rows[:, None].to(tl.int64) * n + cols[None, :]
        gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        t = _factor_product(A, B, a, rows, cols, m, n, r, scale, BM, BN, BR, ONE_BLOCK, PRECISION)
        twice = t + t
        one = t  # T_{-1} = T_1, and T_{-2} = T_2
        two = twice * t - 1.0
        slope = tl.zeros_like(t)
        for g in range(groups):
            partial = tl.zeros((BM, GROUP), tl.float32)
            for d in tl.static_range(GROUP):
                new = twice * one - two
                two = one
                one = new
                slope += tl.load(slopes + g * GROUP + d) * new
                # Along rows first: a row of the tile lives in one warp.
                partial += tl.where(in_group == d, tl.sum(gradient * new, axis=1)[:, None], 0.0)
            moments += tl.where(tl.arange(0, GROUPS)[:, None] == g, tl.sum(partial, axis=0)[None, :], 0.0)
        tl.store(place, (gradient * slope).to(G.dtype.element_ty), mask=inside)
    program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    at = tl.arange(0, GROUPS)[:, None] * GROUP + in_group
    tl.store(MOMENTS + program * GROUPS * GROUP + at, moments)


def _grid(m: int, n: int, tile: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """The grid of programs, and how many tiles each has."""
    rows, cols = triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1])
    tiles = ROWS_OF_TILES if rows * cols >= ROWS_OF_TILES * ENOUGH_PROGRAMS else 1
    return (cols, triton.cdiv(rows, tiles)), tiles


def _shared(A: Tensor, tile: tuple[int, int], tiles: int, dtype: torch.dtype) -> dict[str, Any]:
    block = min(BLOCK_R, max(16, triton.next_power_of_2(len(A))))
    # Half precision of the result forgives what one TF32 product rounds; before Ampere there is none.
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    if torch.cuda.get_device_capability(A.device) < (8, 0):
        precision = "ieee"
    return {
        "BM": tile[0], "BN": tile[1], "BR": block, "TILES": tiles, "ONE_BLOCK": len(A) <= block,
        "PRECISION": precision, "GROUP": GROUP,
    }  # fmt: skip


def effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, series: Series, dtype: torch.dtype) -> Tensor:
    """As `kernels.effective_weight`."""
    A, B = A.contiguous(), B.contiguous()
    (r, n), m = A.shape, len(B)
    out = torch.empty(m, n, dtype=dtype, device=A.device)
    grid, tiles = _grid(m, n, FORM_TILE)
    strides = (0, 0) if weight is None else weight.stride()
    with torch.cuda.device(A.device):
        _form[grid](
            out if weight is None else weight, out, A, B, series.values, series.powers, series.degree,
            series.inverse_radius, m, n, r, *strides, HAS_WEIGHT=weight is not None, HORNER=dtype != torch.float32,
            **_shared(A, FORM_TILE, tiles, dtype),
        )  # fmt: skip
    return out


def pull_back(
    dense: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, series: Series
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """As `kernels.pull_back`; `dense` is overwritten."""
    return effective_weight(weight, A, B, series, dense.dtype), *gradients(dense, A, B, series)


def gradients(dense: Tensor, A: Tensor, B: Tensor, series: Series) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The gradients to A, B and the coefficients; `dense` is overwritten."""
    A, B, dense = A.contiguous(), B.contiguous(), dense.contiguous()
    (r, n), m = A.shape, len(B)
    grid, tiles = _grid(m, n, PULL_TILE)
    count = len(series.values)
    moments = torch.empty(grid[0] * grid[1], count, device=A.device)
    with torch.cuda.device(A.device):
        _pull[grid](
            dense, A, B, series.slopes, series.degree, series.inverse_radius, moments, m, n, r,
            GROUPS=count // GROUP, **_shared(A, PULL_TILE, tiles, dense.dtype),
        )  # fmt: skip
    grad_b, grad_a = _thin_product(dense, A.T), _thin_product(dense.T, B).T
    return grad_a, grad_b, (moments.sum(0, dtype=torch.float64),)


def _thin_product(wide: Tensor, thin: Tensor) -> Tensor:
    """wide @ thin in float32. A half-precision `wide` meets `thin` as a sum of two halves, so that little is lost."""
    if wide.dtype == torch.float32:
        return wide @ thin
    high = thin.to(wide.dtype)
    low = (thin - high.float()).to(wide.dtype)
    both: Tensor = torch.mm(wide, torch.cat([high, low], dim=1), out_dtype=torch.float32)
    return both[:, : thin.shape[1]] + both[:, thin.shape[1] :]
