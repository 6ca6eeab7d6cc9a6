"""Tables: F as one cubic in each of many equal cells, for functions whose series would be long.

There are two kinds. A smooth function is summed at the end of every FINE-th cell, over the basis functions that are not
zero there, and interpolated at the other ends. A spline follows from its knots alone, at a cost per cell and per knot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer
from basisadapt.phi.basis import SEEN, TransferBasis, width
from basisadapt.phi.cubics import Cubics
from basisadapt.phi.sums import Places, evaluations, sums, with_slopes

SLOPE = 8  # the tolerance for F' as a multiple of that for F: its error lies in the few cells where F'' is steep
FINE = 12  # cells between neighboring places at which a smooth function is summed
NEIGHBOURS = 24  # sums that determine a cell: Lagrange's polynomial through them is more accurate than the cubic
WIDEST, CLOSER = 1.0, 2**0.25  # the first distance of sums, in widths of the narrowest function; its next reduction
FEWEST = 16  # spaces between sums, on either side of zero
CHECKED = ((0, 0.8), (FINE // 2, 0.5))  # (cells after a sum, place in the cell) where the error is measured
LOOKED_AT, MARGIN = (0.1, 0.25, 0.5, 0.75, 0.9), 1.25  # places in a spline's cells, and an allowance between them
RESTART = 2048  # cells after which a spline's cumulative sums restart, to limit rounding errors
MAX_SEEN = 1 << 14  # cells per unit of u, beyond which the search for a spacing ends
FEWEST_CELLS, IN_A_UNIT = 64, 10  # the fewest cells of a spline, on either side of zero and per unit of u
MAX_RESTARTED = 1 << 23  # the most pairs of a knot and a restart, which limits memory


@dataclass(frozen=True)
class Cells:
    """The cells of a function. One begins at BA = 0, since float32 is most precise near zero.

    - `step`: their width, shape (), or (M,) for M functions at once, float64.
    - `half` (int): C, the number on either side of zero.

    They cover [−R, R], or the part where functions of compact support are not zero: outside, F without its path is
    constant.
    """

    step: Tensor
    half: int

    @classmethod
    def of(cls, transfer: Transfer, radius: Tensor, half: int) -> Cells:
        """`half` cells on either side of zero, for ranges of `radius` R."""
        return cls(covered(transfer, radius) / half, half)


class Made(Cubics):
    """A table made for one module, and made again to find the gradients to α, ω, the grid and g."""

    def __init__(self, transfer: Transfer, radius: Tensor, half: int, dtype: torch.dtype) -> None:
        self.parameters = transfer.parameters
        self._transfer = dataclasses.replace(transfer.double(), path=False)
        self._cells = Cells.of(transfer, radius, half)
        with torch.no_grad():
            cubics = self.cubics(self._transfer, self._cells).T.to(dtype).contiguous().T
        inverse, most = (1 / self._cells.step).to(dtype), (radius / self._cells.step).to(dtype)
        super().__init__(half, transfer.scaling if transfer.path else 0.0, lambda: (cubics, inverse, most))

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """The number of basis function values from which it is made."""

    @staticmethod
    @abstractmethod
    def fit(
        transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int
    ) -> Made | None:
        """The smallest accurate table with `least` or more cells on either side of zero and at most `most` cells."""

    @staticmethod
    @abstractmethod
    def fewest(basis: TransferBasis, tolerance: float, far: float) -> float:
        """The cells on either side of zero that one function alone needs at this `reach`: where to start a search."""

    @staticmethod
    @abstractmethod
    def cubics(transfer: Transfer, cells: Cells) -> Tensor:
        """p_0..p_3 of every cell, shape (cells, 4), or (cells, k, 4) for k functions side by side.

        Differentiable in the parameters. For M functions at once all shapes begin with M.
        """

    @staticmethod
    @abstractmethod
    def close(transfer: Transfer, cells: Cells, tolerance: float | Tensor) -> Tensor:
        """Whether F without its path, a probe and their slopes are within the tolerance everywhere; shape () or (M,).

        The tolerance is relative to the largest value of each, and SLOPE times as large for slopes. The probe is that
        of `series.compile_series`: where F without its path is small or zero, its gradients must be accurate too.
        """

    def accurate(self, tolerance: float) -> bool:
        """Whether the table is `close`."""
        return bool(self.close(self._transfer, self._cells, tolerance))

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients to α, ω, the grid and g, through the cubics."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self._transfer.parameters]
            cubics = self.cubics(self._transfer.with_parameters(*leaves), self._cells)
            grads = torch.autograd.grad(cubics, leaves, sums[0].T, allow_unused=True)
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True))


class Table(Made):
    """The table of a smooth F, from its sums at the end of every FINE-th cell.

    Lagrange's polynomials through the nearest NEIGHBOURS sums give values and slopes at all ends of cells, and each
    cell has Hermite's cubic through them.
    """

    @staticmethod
    def fit(
        transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int
    ) -> Table | None:
        """See `Made`."""
        widths = float(reach(transfer, radius)) / max(width(type(transfer.basis)), 1e-300)
        spacing = _spacing(type(transfer.basis), tolerance)
        while (half := FINE * max(FEWEST, math.ceil(min(widths / spacing, most)))) <= most // 2:
            spacing /= CLOSER
            if half >= least and (table := Table(transfer, radius, half, dtype)).accurate(tolerance):
                return table
        return None

    @staticmethod
    def fewest(basis: TransferBasis, tolerance: float, far: float) -> float:
        """See `Made`."""
        return FINE * far / max(width(type(basis)), 1e-300) / _spacing(type(basis), tolerance)

    @property
    def evaluations(self) -> int:
        """The number of basis function values from which it is made."""
        places = _places(self._transfer, self._cells)
        return evaluations(self._transfer.basis, places, *self._transfer.parameters[1:3])

    @staticmethod
    def close(transfer: Transfer, cells: Cells, tolerance: float | Tensor) -> Tensor:
        """See `Made`; measured at CHECKED, which is enough because the error varies no faster than the sums."""
        both = series.with_probe(transfer)
        held = both.with_parameters(*(p.detach() for p in both.parameters))
        fine = torch.ones_like(cells.step, dtype=torch.bool)
        with torch.no_grad():
            cubics = Table.cubics(held, cells)
            first, unit = -cells.half // FINE, held.gain * cells.step * FINE
            for after, s in CHECKED:
                places = Places(unit, first + (after + s) / FINE, 2 * cells.half // FINE)
                phi, slope = with_slopes(held.basis, places, *held.parameters[:3])
                made = cubics[..., after::FINE, :, :][..., : places.count, :, :]
                value = made @ cubics.new_tensor([1, s, s**2, s**3])
                rate = made @ cubics.new_tensor([0, 1, 2 * s, 3 * s**2]) / _along(cells.step, value)
                fine &= _within(value, _of_phi(held, phi), tolerance)
                fine &= _within(rate, held.scaling * slope, SLOPE * tolerance)
                if not bool(fine.any()):
                    break
        return fine

    @staticmethod
    def cubics(transfer: Transfer, cells: Cells) -> Tensor:
        """See `Made`."""
        phi = sums(transfer.basis, _places(transfer, cells), *transfer.parameters[:3])
        at = transfer.grid.dim() - 1  # the dimension of places
        made = _of_phi(transfer, phi).unfold(at, NEIGHBOURS, 1) @ _lagrange(cells.step.device)
        made = made.reshape(*made.shape[:-1], FINE, 4)
        return (made.transpose(at + 1, at + 2) if made.dim() == at + 4 else made).flatten(at, at + 1)


def _places(transfer: Transfer, cells: Cells) -> Places:
    """The places at which a table's function is summed."""
    spaces = 2 * cells.half // FINE + 1
    first = -cells.half // FINE - (NEIGHBOURS // 2 - 1)
    return Places(transfer.gain * cells.step * FINE, first, spaces + NEIGHBOURS - 1)


class Spline(Made):
    """The table of a cubic spline F, from the jumps of its third derivative at the knots.

    They give values and slopes at the ends of the cells. Hermite's cubic through them is F itself, except in cells that
    contain a knot.
    """

    @staticmethod
    def fit(
        transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int
    ) -> Spline | None:
        """See `Made`."""
        half = max(FEWEST_CELLS, least, math.ceil(min(IN_A_UNIT * float(reach(transfer, radius)), most)))
        most = min(most, MAX_RESTARTED * RESTART // (len(transfer.grid) * len(transfer.basis.jumps)))
        while 2 * half <= most:
            spline = Spline(transfer, radius, half, dtype)
            if spline.accurate(tolerance):
                return spline
            half = half * 3 // 2
        return None

    @staticmethod
    def fewest(basis: TransferBasis, tolerance: float, far: float) -> float:
        """See `Made`."""
        return IN_A_UNIT * far

    @property
    def evaluations(self) -> int:
        """Zero: no basis function is evaluated."""
        return 0

    @staticmethod
    def close(transfer: Transfer, cells: Cells, tolerance: float | Tensor) -> Tensor:
        """See `Made`; from the cubic's error in cells where the third derivative jumps, the only ones with an error."""
        both = series.with_probe(transfer)
        fine = torch.ones_like(cells.step, dtype=torch.bool)
        with torch.no_grad():
            phi, slope = _states(both, cells)
            count = phi.shape[-2] - 1
            place, jump = _knots(both, cells)
            cell = place.floor().long()
            inside = (cell >= 0) & (cell < count)
            cell, after = cell.clamp(0, count - 1), (place - cell).masked_fill(~inside, 0.0).unsqueeze(-1)
            jump = jump * inside.unsqueeze(-1)
            phi = phi - _origin(both) if both.centre else phi
            for s in LOOKED_AT:
                for of_knot, size, allowed in zip(_beside_a_knot(after, s), (phi, slope), (1, SLOPE), strict=True):
                    error = _added_up(cell, jump * of_knot, count).abs().amax(-2)
                    allowance = allowed * _beside(tolerance, error) * size.abs().amax(-2)
                    fine &= (MARGIN * error <= allowance).all(-1)
        return fine

    @staticmethod
    def cubics(transfer: Transfer, cells: Cells) -> Tensor:
        """See `Made`."""
        phi, slope = _states(transfer, cells)
        if transfer.alpha.dim() == transfer.grid.dim():
            phi, slope = phi.squeeze(-1), slope.squeeze(-1)
        slope = transfer.scaling * (slope / _along(transfer.gain, slope))
        return _hermite(_of_phi(transfer, phi), slope, transfer.grid.dim() - 1)


def _knots(transfer: Transfer, cells: Cells) -> tuple[Tensor, Tensor]:
    """The places of all knots, in cells from the first one, and the jumps of φ''' there: shapes (5N,) and (5N, k).

    k is 1 for a single function.
    """
    unit = (transfer.gain * cells.step).unsqueeze(-1)
    knots, jumps = _jumps(type(transfer.basis), unit.device)
    place = (transfer.grid.unsqueeze(-1) + knots / transfer.omega.unsqueeze(-1)) / unit.unsqueeze(-1) + cells.half
    cubed = (transfer.omega * unit) ** 3
    jump = torch.einsum("...nk,...n,j->...njk", transfer.alpha.reshape(*cubed.shape, -1), cubed, jumps)
    return place.flatten(-2), jump.flatten(-3, -2)


@functools.cache
def _jumps(basis: type[TransferBasis], device: torch.device) -> tuple[Tensor, Tensor]:
    """A spline's knots and jumps on the device, copied there once: a CUDA graph cannot capture a copy from the host."""
    with torch.inference_mode(False):
        knots, jumps = torch.tensor(list(basis.jumps.items()), dtype=torch.float64, device=device).unbind(1)
    return knots, jumps


def _added_up(cell: Tensor, values: Tensor, count: int) -> Tensor:
    """The sums of `values` (..., n, k) in each of `count` cells, (..., count, k); cell: of the values, (..., n)."""
    leading = cell.shape[:-1]
    first = count * torch.arange(math.prod(leading), device=cell.device).view(*leading, 1)
    added = values.new_zeros(math.prod(leading) * count, values.shape[-1])
    # On a GPU index_add would sum in no fixed order.
    added = added.index_put(((cell + first).flatten(),), values.flatten(0, -2), accumulate=True)
    return added.view(*leading, count, -1)


def _states(transfer: Transfer, cells: Cells) -> tuple[Tensor, Tensor]:
    """φ and its slope per cell at the ends of the cells, shape (cells + 1, k) each.

    They are sums of truncated powers of the distances from the knots, which restart every RESTART cells.
    """
    place, jump = _knots(transfer, cells)
    ends, knots = 2 * cells.half + 2, len(transfer.basis.jumps)
    blocks = -(-ends // RESTART)
    start = RESTART * torch.arange(blocks, dtype=place.dtype, device=place.device).unsqueeze(1)
    covering = start <= place.detach()[..., knots - 1 :: knots].unsqueeze(-2)
    behind = functional.relu(start - place.unsqueeze(-2)) * covering.repeat_interleave(knots, -1)
    powers = [(behind > 0).to(place.dtype), behind, behind**2 / 2, behind**3 / 6]
    # A knot counts from the end of its cell on; at the start of a block, `powers` already has it.
    end = place.detach().floor() + 1
    counted = (end > 0) & (end < ends) & (end % RESTART != 0)
    before, counted_jump = (end - place) * counted, jump * counted.unsqueeze(-1)
    end = end.clamp(0, ends - 1).long()
    states: list[Tensor] = []
    for power, factor in zip(powers, (torch.ones_like(before), before, before**2 / 2, before**3 / 6), strict=True):
        added = _added_up(end, counted_jump * factor.unsqueeze(-1), blocks * RESTART)
        added = added.reshape(*place.shape[:-1], blocks, RESTART, -1)
        added = torch.cat([(power @ jump).unsqueeze(-2), added[..., 1:, :]], -2)
        # Taylor's polynomial: what the higher derivatives at one end add up to the next.
        for order, state in enumerate(reversed(states), start=1):
            added = added + functional.pad(state[..., :-1, :], (0, 0, 1, 0)) / math.factorial(order)
        states.append(added.cumsum(-2))
    phi, slope = (state.flatten(-3, -2)[..., :ends, :] for state in (states[3], states[2]))
    return phi, slope


def fit(transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int) -> Made | None:
    """The first kind's smallest table that is accurate to `tolerance`, or None; see `Made.fit`."""
    tables = (kind.fit(transfer, radius, tolerance, dtype, most, least) for kind in kinds(transfer.basis))
    return next(filter(None, tables), None)


def kinds(basis: TransferBasis) -> list[type[Made]]:
    """The kinds of tables that a basis may have, the better one first."""
    return [Spline, Table] if basis.jumps and basis.argument == "shifted" else [Table]


def reach(transfer: Transfer, radius: Tensor) -> Tensor:
    """The largest |u| of the narrowest basis function over the cells of a table; see `series.reach`."""
    return series.reach(transfer, covered(transfer, radius))


def covered(transfer: Transfer, radius: Tensor) -> Tensor:
    """The largest |BA| up to R at which a basis function is not zero."""
    with torch.no_grad():
        if transfer.basis.argument != "shifted" or math.isinf(transfer.basis.support):
            return radius
        reached = (transfer.grid.double().abs() + transfer.basis.support / transfer.omega.double()).amax(-1)
        return torch.minimum(radius, reached / transfer.gain.double())


def _along(numbers: Tensor, values: Tensor) -> Tensor:
    """One number per module, in a shape that multiplies `values`; unchanged for a single module."""
    return numbers.reshape(*numbers.shape, *[1] * (values.dim() - numbers.dim()))


def _beside(tolerance: float | Tensor, values: Tensor) -> float | Tensor:
    """`_along` for tolerances."""
    return _along(tolerance, values) if isinstance(tolerance, Tensor) else tolerance


def _origin(transfer: Transfer) -> Tensor:
    """φ(0), with a dimension of length 1 for places."""
    return transfer.phi(transfer.grid.new_zeros(*transfer.grid.shape[:-1], 1))


def _of_phi(transfer: Transfer, phi: Tensor) -> Tensor:
    """F without its path, from the values of φ."""
    if transfer.centre:
        phi = phi - _origin(transfer)
    return transfer.scaling * (phi / _along(transfer.gain, phi))


def _within(found: Tensor, truth: Tensor, tolerance: float | Tensor) -> Tensor:
    """Whether the error of every column of (..., n, k) is within the tolerance, relative to its largest entry."""
    size = truth.abs().amax(-2)
    return ((found - truth).abs().amax(-2) <= _beside(tolerance, size) * size).all(-1)


def _beside_a_knot(after: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """The error at s of Hermite's cubic through the ends of (s − knot)₊³ / 6, and that of its slope."""
    value, slope, beyond = (1 - after) ** 3 / 6, (1 - after) ** 2 / 2, (s - after).clamp_min(0.0)
    of_value = value * (3 * s**2 - 2 * s**3) + slope * (s**3 - s**2) - beyond**3 / 6
    return of_value, value * (6 * s - 6 * s**2) + slope * (3 * s**2 - 2 * s) - beyond**2 / 2


def _hermite(value: Tensor, slope: Tensor, dim: int = 0) -> Tensor:
    """The cubics between neighboring values (..., n + 1, ...) with these slopes, in powers of s: (..., n, ..., 4)."""
    count = slope.shape[dim] - 1
    rise, first, last = value.diff(dim=dim), slope.narrow(dim, 0, count), slope.narrow(dim, 1, count)
    start = value.narrow(dim, 0, count)
    return torch.stack([start, first, 3 * rise - 2 * first - last, first + last - 2 * rise], -1)


@functools.cache
def _spacing(basis: type[TransferBasis], tolerance: float) -> float:
    """The largest accurate distance of sums for one function alone, in its widths: where a search for many starts.

    It also bounds the distance for functions so narrow that the check of many would miss them.
    """
    spacing = WIDEST
    with torch.inference_mode(False), torch.no_grad():
        one = torch.ones(1, dtype=torch.float64)
        alone = Transfer(basis(), one, one, 0 * one, one[0])
        while spacing > tolerance:
            half = FINE * math.ceil(SEEN / (spacing * max(width(basis), 1e-300)))
            if half > SEEN * MAX_SEEN or Table(alone, SEEN * one[0], half, torch.float64).accurate(tolerance):
                break
            spacing /= CLOSER
    return spacing


@functools.cache
def _lagrange(device: torch.device) -> Tensor:
    """The matrix (NEIGHBOURS, 4 · FINE) from sums at −NEIGHBOURS / 2 + 1..NEIGHBOURS / 2 to the cubics on [0, 1]."""
    with torch.inference_mode(False), torch.enable_grad():
        of_sums = torch.arange(1.0 - NEIGHBOURS // 2, 1.0 + NEIGHBOURS // 2, dtype=torch.float64)
        ends = (torch.arange(FINE + 1, dtype=torch.float64) / FINE).requires_grad_()
        made = []
        for place in of_sums:
            others = of_sums[of_sums != place]
            value = ((ends.unsqueeze(1) - others) / (place - others)).prod(1)
            (slope,) = torch.autograd.grad(value.sum(), ends)
            made.append(_hermite(value.detach(), slope / FINE).flatten())
    return torch.stack(made).to(device)
