"""Sums of φ's N functions at many equally spaced places, and their gradients.

A function of compact support is evaluated only where it is not zero. The gradients are the transposed sums, of b and b'
with the upstream gradient: a matrix product for some functions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from basisadapt.phi.basis import ARGUMENTS, TransferBasis

AT_ONCE = {"cpu": 1 << 15}  # function values held at a time: they fit into a core's cache
AT_ONCE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Places:
    """x_j = unit · (first + j), j = 0..count − 1. unit: > 0, shape (), or (M,) for M functions at once, float64."""

    unit: Tensor
    first: float
    count: int

    def at(self, index: Tensor) -> Tensor:
        """x_j for the indices j."""
        return self.unit.unsqueeze(-1) * (index.double() + self.first)


def sums(basis: TransferBasis, places: Places, alpha: Tensor, omega: Tensor, grid: Tensor) -> Tensor:
    """Σᵢ αᵢ b(ωᵢ, x_j, xᵢ) for all j: shape (count,) for alpha (N,), or (count, k) for alpha (N, k); float64.

    omega, grid: shape (N,). For M functions at once all shapes begin with M. Differentiable once in alpha, omega, grid
    and the places' unit.
    """
    single = alpha.dim() == grid.dim()
    columns = alpha.unsqueeze(-1) if single else alpha
    found: Tensor = _Sums.apply(  # type: ignore[no-untyped-call]
        basis, places.first, places.count, places.unit, columns, omega, grid
    )
    return found.squeeze(-1) if single else found


@torch.no_grad()
def with_slopes(
    basis: TransferBasis, places: Places, alpha: Tensor, omega: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """φ and φ' at the places, (count, k) each, for alpha (N, k). For M functions at once all shapes begin with M."""
    return _add_up(basis, places, alpha, omega, grid, slopes=True)


@torch.no_grad()
def evaluations(basis: TransferBasis, places: Places, omega: Tensor, grid: Tensor) -> int:
    """The number of function values that `sums` computes."""
    return len(omega) * _window(basis, places, omega, grid)[1]


def _window(basis: TransferBasis, places: Places, omega: Tensor, grid: Tensor) -> tuple[Tensor, int]:
    """The first place at which each function is evaluated, shape (N,), and the number of places, the same for all."""
    # On other devices than a CPU the host would wait for this number.
    if omega.device.type == "cpu" and omega.dim() == 1 and basis.argument == "shifted" and math.isfinite(basis.support):
        half = basis.support / (omega * places.unit)
        width = 2 * float(half.amax()) + 2  # the widest function's
        if width < places.count:
            first = (grid / places.unit - places.first - half).ceil()
            return first.clamp(0, places.count - int(width)).long(), int(width)
    return torch.zeros_like(omega, dtype=torch.long), places.count


@dataclass(frozen=True)
class _Some:
    """A slice of the N functions, and the indices j of their places: shape (n, width), or (width,) for all places."""

    rows: slice
    index: Tensor

    def at(self, places: Places) -> Tensor:
        """The places in a shape to broadcast with ω: (n, width), or (1, width) or (M, 1, width) for all places."""
        x = places.at(self.index)
        return x.unsqueeze(-2) if self.index.dim() == 1 else x


def _some(basis: TransferBasis, places: Places, omega: Tensor, grid: Tensor) -> Iterator[_Some]:
    first, width = _window(basis, places, omega, grid)
    counted = torch.arange(width, device=omega.device)
    together = omega[..., 0].numel()
    step = max(1, AT_ONCE.get(omega.device.type, AT_ONCE_ELSEWHERE) // (width * together))
    for start in range(0, omega.shape[-1], step):
        rows = slice(start, start + step)
        yield _Some(rows, counted if width == places.count else first[rows].unsqueeze(1) + counted)


def _argument(basis: TransferBasis, x: Tensor, omega: Tensor, grid: Tensor) -> Tensor:
    return ARGUMENTS[basis.argument](x, omega.unsqueeze(-1), grid.unsqueeze(-1))


def _add_up(
    basis: TransferBasis, places: Places, alpha: Tensor, omega: Tensor, grid: Tensor, slopes: bool = False
) -> tuple[Tensor, Tensor]:
    """φ and, if `slopes`, φ' at the places."""
    totals = alpha.new_zeros(1 + slopes, *alpha.shape[:-2], places.count, alpha.shape[-1])
    for some in _some(basis, places, omega, grid):
        of = some.rows
        values = basis.values(_argument(basis, some.at(places), omega[..., of], grid[..., of]), slopes)
        factors = alpha[..., of, :], alpha[..., of, :] * omega[..., of].unsqueeze(-1)
        for total, value, factor in zip(totals, values, factors, strict=False):
            if some.index.dim() == 1:
                (total.addmm_ if total.dim() == 2 else total.baddbmm_)(value.mT, factor)
            else:
                total.index_add_(0, some.index.flatten(), (value.unsqueeze(-1) * factor.unsqueeze(1)).flatten(0, 1))
    return totals[0], totals[-1]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, basis: TransferBasis, first: float, count: int, unit: Tensor, alpha: Tensor, omega: Tensor,
        grid: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.basis, ctx.places = basis, Places(unit.detach(), first, count)
        ctx.save_for_backward(alpha, omega, grid)
        return _add_up(basis, ctx.places, alpha, omega, grid)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        basis, places, (gradient,) = ctx.basis, ctx.places, upstream
        alpha, omega, grid = ctx.saved_tensors
        of_alpha, moments = torch.empty_like(alpha), alpha.new_empty(*omega.shape, 2)
        for some in _some(basis, places, omega, grid):
            of, x = some.rows, some.at(places)
            b, slope = basis.values(_argument(basis, x, omega[..., of], grid[..., of]), slopes=True)
            if some.index.dim() == 1:
                of_alpha[..., of, :] = b @ gradient
                found = (slope @ torch.cat([gradient, gradient * x.mT], -1)).unflatten(-1, (2, -1))
            else:
                there = gradient[some.index]
                of_alpha[of] = torch.einsum("nw,nwk->nk", b, there)
                found = torch.stack([torch.einsum("nw,nwk->nk", s, there) for s in (slope, slope * x)], 1)
            moments[..., of, :] = (found * alpha[..., of, :].unsqueeze(-2)).sum(-1)
        # u is affine in x, so two sums over the places, of α G b'(u) and of α G b'(u) x, give all of u's gradients.
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (omega, grid)]
            start, end = (ARGUMENTS[basis.argument](x, *leaves) for x in (omega.new_zeros(()), omega.new_ones(())))
            total = (moments[..., 0] * start + moments[..., 1] * (end - start)).sum()
            of_omega, of_grid = torch.autograd.grad(total, leaves, allow_unused=True)
        of_unit = (moments[..., 1] * (end - start).detach()).sum(-1) / places.unit
        return None, None, None, of_unit, of_alpha, of_omega, of_grid
