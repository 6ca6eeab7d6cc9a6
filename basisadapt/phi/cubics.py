"""A table's cubics on a matrix: in each of many equal cells F is one cubic. `cubic_tables` makes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from basisadapt.phi.evaluators import Evaluator, spoil_beyond

FIXED_POINT = 1 << 36  # the largest gradient in units of the sums: 2^26 summands fit into 62 bits


class Cubics(Evaluator):
    """F ≈ p_0 + p_1 s + p_2 s² + p_3 s³ + path at the place s in [0, 1] of each of 2C cells and a few behind them."""

    width = 12

    def __init__(self, half: int, path: float, parts: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        """half: C. parts: p_0..p_3 of every cell, shape (cells, 4), 1 / a cell's width, and R in cells.

        They are made when they are needed: kernels need none of them, and a model has hundreds of tables.
        """
        self.half, self.path, self._made = half, path, functools.cache(parts)

    @property
    def cells(self) -> int:
        """The number of cells."""
        return len(self._made()[0])

    def _locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each element and the place in it, both flattened."""
        _, inverse, most = self._made()
        place = z.flatten() * inverse
        spoil_beyond(place, most)
        place.clamp_(-self.half, self.half)
        cell = place.floor()
        place.sub_(cell)  # exact; adding C to the place first would round it
        return cell.add_(self.half).nan_to_num_(0.0).long(), place

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        cell, s = self._locate(z)
        value = self._of(cell, s)[0].view_as(z)
        return value.add_(z, alpha=self.path) if self.path else value

    def _of(self, cell: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The values of the cubics, and their coefficients."""
        p = [column.index_select(0, cell) for column in self._made()[0].unbind(1)]
        value = torch.addcmul(p[2], p[3], s)
        torch.addcmul(p[1], value, s, out=value)
        return torch.addcmul(p[0], value, s, out=value), p

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and Σ gradient · s^k in every cell."""
        cell, s = self._locate(z)
        value, p = self._of(cell, s)
        slope = torch.addcmul(p[2], p[3], s, value=1.5)
        slope = torch.addcmul(p[1], slope, s, value=2, out=slope).mul_(self._made()[1])
        if self.path:
            value.add_(z.flatten(), alpha=self.path)
            slope.add_(self.path)
        sums = self._sums(cell, s, gradient.flatten())
        return value.view_as(z), slope.view_as(z).mul_(gradient), (sums,)

    def _sums(self, cell: Tensor, s: Tensor, gradient: Tensor) -> Tensor:
        weighted, place = gradient.to(torch.float64, copy=True), s.double()
        if cell.device.type == "cpu":
            sums = torch.zeros(4, self.cells, dtype=torch.float64)
            sums[0].scatter_add_(0, cell, weighted)
            for row in sums[1:]:
                row.scatter_add_(0, cell, weighted.mul_(place))
            return sums
        # A sum of integers does not depend on the order, so the result is reproducible bit for bit on a GPU too.
        unit = FIXED_POINT / weighted.abs().amax().clamp_min(1e-300)
        weighted = weighted * unit
        whole = torch.zeros(4, self.cells, dtype=torch.int64, device=cell.device)
        for row in whole:
            row.index_add_(0, cell, weighted.nan_to_num().round().long())
            weighted = weighted * place
        return whole.double() / unit


class PackedRow:
    """The layout of the numbers that belong to a `Row`, in a row of SIZE.

    `SCALE`, `REACH`, `PATH`, `INVERSE`, `SLOPE`, `HALF`: the places of 1 / R, R / step, path · R, 1 / step, the path
    and C.
    """

    SCALE, REACH, PATH, INVERSE, SLOPE, HALF = range(6)
    SIZE = 8  # a power of two keeps every row aligned


class Row(Cubics):
    """One module's table of those made at once (see `together`); its gradients are those of the cubics themselves."""

    def __init__(self, cubics: Tensor, half: int, packed: Tensor, path: float) -> None:
        """cubics: shape (cells, 4), with gradients.

        packed: shape (SIZE,), in their dtype, in the layout of `PackedRow`: what kernels also need.
        """
        super().__init__(half, path, lambda: (cubics.detach(), packed[PackedRow.INVERSE], packed[PackedRow.REACH]))
        self.parameters, self.packed = (cubics,), packed

    @functools.cached_property
    def pairs(self) -> Tensor:
        """The cubics, two float32 numbers per int64, shape (cells, 2)."""
        return self.parameters[0].detach().view(torch.int64)

    @property
    def cells(self) -> int:
        """The number of cells."""
        return self.parameters[0].shape[0]

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradient to the cubics."""
        return (sums[0].T.to(self.parameters[0].dtype),)
