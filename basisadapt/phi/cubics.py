"""F as one cubic in each of many equal cells, for functions whose series is long: tables, by two ways to make them.

A table of a smooth function comes from sums of its N functions at every FINE-th cell's end, interpolated to the others:
of those N that reach there, or, where they have no compact support, of all. One of a spline comes from its knots alone:
it takes so much for every cell and every knot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer
from basisadapt.phi.basis import SEEN, TransferBasis, width
from basisadapt.phi.evaluators import Evaluator, spoil_beyond
from basisadapt.phi.sums import Places, evaluations, sums, with_slopes

SLOPE = 8  # a table's tolerance for F', as a multiple: its error sits in the few cells where F'' is steep
FIXED_POINT = 1 << 36  # one unit of the largest gradient: room for 2^26 summands in 62 bits
FINE = 12  # cells between neighbouring places where a smooth function is summed
NEIGHBOURS = 24  # sums that make a cell: Lagrange's polynomial through them leaves out less than the cubic does
WIDEST, CLOSER = 1.0, 2**0.25  # between sums, in widths of the narrowest function, and how much closer to try next
FEWEST = 16  # spaces between sums, on either side of zero
CHECKED = ((0, 0.8), (FINE // 2, 0.5))  # cells behind a sum, and places in them, where a table is checked
LOOKED_AT, MARGIN = (0.1, 0.25, 0.5, 0.75, 0.9), 1.25  # places in a spline's cells, and what lies between them
RESTART = 2048  # cells after which a spline's cumulative sums are begun anew, before rounding has grown
MOST_SEEN = 1 << 14  # cells in a unit of u, where nothing is smooth enough
FEWEST_CELLS, IN_A_UNIT = 64, 10  # of a spline, on either side of zero, and in a unit of u
MOST_RESTARTED = 1 << 23  # knots that are summed at such places: not in more memory than that takes


class Cubics(Evaluator):
    """F ≈ p_0 + p_1 s + p_2 s² + p_3 s³ + path in each of 2C cells and a few behind them, s in [0, 1] being the place
    in it. A cell begins where BA is zero, so that float32 knows places near zero best.

    The cells cover ±R, or as much of it as the functions of a compact basis reach: beyond, F less its path is constant.
    """

    width = 12

    def __init__(self, transfer: Transfer, radius: Tensor, half: int, dtype: torch.dtype) -> None:
        self.parameters = transfer.parameters
        self.half = half
        self._transfer = dataclasses.replace(transfer.double(), path=False)
        self._path = transfer.scaling if transfer.path else 0.0
        self._step = covered(transfer, radius) / half
        with torch.no_grad():
            self._columns = self._cubics(self._transfer).T.to(dtype).contiguous().unbind()
        self._inverse, self._most = (1 / self._step).to(dtype), (radius / self._step).to(dtype)

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return len(self._columns[0])

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How many values of basis functions it is made from."""

    @abstractmethod
    def accurate(self, tolerance: float) -> bool:
        """Whether F without its path and a probe, and their slopes, are within the tolerance in every cell.

        As of a series, see `series.compile_series`: next to BA the part that trains may be small, or zero, and its
        gradients have to be right all the same. Relative to the largest value of each; SLOPE times as much of a slope.
        """

    @abstractmethod
    def _cubics(self, transfer: Transfer) -> Tensor:
        """p_0 .. p_3 of every cell, (cells, 4), or (cells, k, 4) of k functions; differentiable in the parameters."""

    def _locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each element and the place in it, flat."""
        place = z.flatten() * self._inverse
        spoil_beyond(place, self._most)
        place.clamp_(-self.half, self.half)
        cell = place.floor()
        place.sub_(cell)  # exact, where adding C to the place before would have rounded it
        return cell.add_(self.half).nan_to_num_(0.0).long(), place

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        cell, s = self._locate(z)
        value = self._of(cell, s)[0].view_as(z)
        return value.add_(z, alpha=self._path) if self._path else value

    def _of(self, cell: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The cubics' values, and their coefficients."""
        p = [column.index_select(0, cell) for column in self._columns]
        value = torch.addcmul(p[2], p[3], s)
        torch.addcmul(p[1], value, s, out=value)
        return torch.addcmul(p[0], value, s, out=value), p

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and Σ gradient · s^k in every cell."""
        cell, s = self._locate(z)
        value, p = self._of(cell, s)
        slope = torch.addcmul(p[2], p[3], s, value=1.5)
        slope = torch.addcmul(p[1], slope, s, value=2, out=slope).mul_(self._inverse)
        if self._path:
            value.add_(z.flatten(), alpha=self._path)
            slope.add_(self._path)
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
        # Whole numbers add up to the same sum in every order, so that the result repeats bit for bit on a GPU too.
        unit = FIXED_POINT / weighted.abs().amax().clamp_min(1e-300)
        weighted = weighted * unit
        whole = torch.zeros(4, self.cells, dtype=torch.int64, device=cell.device)
        for row in whole:
            row.index_add_(0, cell, weighted.nan_to_num().round().long())
            weighted = weighted * place
        return whole.double() / unit

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Through the cubics to α, ω, the grid and g."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self._transfer.parameters]
            cubics = self._cubics(self._transfer.with_parameters(*leaves))
            grads = torch.autograd.grad(cubics, leaves, sums[0].T, allow_unused=True)
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True))


class Table(Cubics):
    """Of a smooth F: it is summed at every FINE-th cell's end, and between them interpolated by Lagrange's polynomials
    through the nearest NEIGHBOURS sums, whose values and slopes at the cells' ends Hermite's cubics meet."""

    @staticmethod
    def fit(
        transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int
    ) -> Table | None:
        """The first table that is accurate, from `least` cells on either side of zero on; None beyond `most` cells."""
        widths = float(reach(transfer, radius)) / max(width(type(transfer.basis)), 1e-300)
        spacing = _spacing(type(transfer.basis), tolerance)
        while (half := FINE * max(FEWEST, math.ceil(min(widths / spacing, most)))) <= most // 2:
            spacing /= CLOSER
            if half >= least and (table := Table(transfer, radius, half, dtype)).accurate(tolerance):
                return table
        return None

    @property
    def evaluations(self) -> int:
        """How many values of basis functions it is made from."""
        return evaluations(self._transfer.basis, self._places(self._transfer), *self._transfer.parameters[1:3])

    def accurate(self, tolerance: float) -> bool:
        """See `Cubics`; at CHECKED, for what is left out changes no faster than the sums do."""
        both = series.with_probe(self._transfer)
        held = both.with_parameters(*(p.detach() for p in both.parameters))
        with torch.no_grad():
            cubics = self._cubics(held)
            first, unit = -self.half // FINE, held.gain * self._step * FINE
            for after, s in CHECKED:
                places = Places(unit, first + (after + s) / FINE, 2 * self.half // FINE)
                phi, slope = with_slopes(held.basis, places, *held.parameters[:3])
                made = cubics[after::FINE][: places.count]
                value = made @ cubics.new_tensor([1, s, s**2, s**3])
                rate = made @ cubics.new_tensor([0, 1, 2 * s, 3 * s**2]) / self._step
                if not _within(value, _of_phi(held, phi), tolerance):
                    return False
                if not _within(rate, held.scaling * slope, SLOPE * tolerance):
                    return False
        return True

    def _places(self, transfer: Transfer) -> Places:
        spaces = 2 * self.half // FINE + 1
        first = -self.half // FINE - (NEIGHBOURS // 2 - 1)
        return Places(transfer.gain * self._step * FINE, first, spaces + NEIGHBOURS - 1)

    def _cubics(self, transfer: Transfer) -> Tensor:
        phi = sums(transfer.basis, self._places(transfer), *transfer.parameters[:3])
        made = _of_phi(transfer, phi).unfold(0, NEIGHBOURS, 1) @ _lagrange(self._step.device)
        made = made.reshape(*made.shape[:-1], FINE, 4)
        return made.flatten(0, 1) if phi.dim() == 1 else made.transpose(1, 2).flatten(0, 1)


class Spline(Cubics):
    """Of a cubic spline F: its values and slopes at the cells' ends add up from the jumps at its knots, and
    Hermite's cubic through them is F itself but in cells that hold a knot."""

    @staticmethod
    def fit(
        transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int
    ) -> Spline | None:
        """As of a table."""
        half = max(FEWEST_CELLS, least, math.ceil(min(IN_A_UNIT * float(reach(transfer, radius)), most)))
        most = min(most, MOST_RESTARTED * RESTART // (len(transfer.grid) * len(transfer.basis.jumps)))
        while 2 * half <= most:
            spline = Spline(transfer, radius, half, dtype)
            if spline.accurate(tolerance):
                return spline
            half = half * 3 // 2
        return None

    @property
    def evaluations(self) -> int:
        """None."""
        return 0

    def accurate(self, tolerance: float) -> bool:
        """See `Cubics`; by what a cubic is off in a cell where the third derivative jumps, and nowhere else."""
        both = series.with_probe(self._transfer)
        with torch.no_grad():
            phi, slope = self._states(both)
            place, jump = self._knots(both)
            cell = place.floor().long()
            inside = (cell >= 0) & (cell < self.cells)
            cell, after, jump = cell[inside], (place - cell)[inside].unsqueeze(1), jump[inside]
            phi = phi - both.phi(phi.new_zeros(1)) if both.centre else phi
            for s in LOOKED_AT:
                for of_knot, size, allowed in zip(_beside_a_knot(after, s), (phi, slope), (1, SLOPE), strict=True):
                    error = phi.new_zeros(self.cells, 2).index_add_(0, cell, jump * of_knot).abs().amax(0)
                    if not bool((MARGIN * error <= allowed * tolerance * size.abs().amax(0)).all()):
                        return False
        return True

    def _knots(self, transfer: Transfer) -> tuple[Tensor, Tensor]:
        """In cells from the first on, where the knots of all functions lie and how the third derivative of φ jumps
        there: (5N,), and (5N,) or (5N, k)."""
        unit = transfer.gain * self._step
        knots, jumps = (
            transfer.grid.new_tensor(list(part)) for part in zip(*transfer.basis.jumps.items(), strict=True)
        )
        place = (transfer.grid.unsqueeze(1) + knots / transfer.omega.unsqueeze(1)) / unit + self.half
        cubed = (transfer.omega * unit) ** 3
        jump = torch.einsum("nk,n,j->njk", transfer.alpha.reshape(len(cubed), -1), cubed, jumps)
        return place.flatten(), jump.flatten(0, 1)

    def _states(self, transfer: Transfer) -> tuple[Tensor, Tensor]:
        """φ and its slope in cells at the cells' ends, (cells + 1, k) each: sums of the knots' truncated powers, begun
        anew now and then."""
        place, jump = self._knots(transfer)
        ends, knots = 2 * self.half + 2, len(transfer.basis.jumps)
        blocks = -(-ends // RESTART)
        start = RESTART * torch.arange(blocks, dtype=place.dtype, device=place.device)
        covering = start.unsqueeze(1) <= place.detach().view(-1, knots)[:, -1]
        behind = functional.relu(start.unsqueeze(1) - place) * covering.repeat_interleave(knots, 1)
        powers = [(behind > 0).to(place.dtype), behind, behind**2 / 2, behind**3 / 6]
        # A knot counts from the end of its cell on; where a block starts, it is among the sums begun anew.
        end = place.detach().floor() + 1
        counted = (end > 0) & (end < ends) & (end % RESTART != 0)
        before, counted_jump = (end - place) * counted, jump * counted.unsqueeze(1)
        end = end.clamp(0, ends - 1).long()
        states: list[Tensor] = []
        for power, factor in zip(powers, (torch.ones_like(before), before, before**2 / 2, before**3 / 6), strict=True):
            added = jump.new_zeros(blocks * RESTART, jump.shape[1])
            # Not index_add, whose order of summands is not fixed on a GPU.
            added = added.index_put((end,), counted_jump * factor.unsqueeze(1), accumulate=True)
            added = added.view(blocks, RESTART, -1)
            added = torch.cat([(power @ jump).unsqueeze(1), added[:, 1:]], 1)
            # What the derivatives of the end before add on the way to the next: Taylor's polynomial.
            for order, state in enumerate(reversed(states), start=1):
                added = added + functional.pad(state[:, :-1], (0, 0, 1, 0)) / math.factorial(order)
            states.append(added.cumsum(1))
        phi, slope = (state.flatten(0, 1)[:ends] for state in (states[3], states[2]))
        return phi, slope

    def _cubics(self, transfer: Transfer) -> Tensor:
        phi, slope = self._states(transfer)
        if transfer.alpha.dim() == 1:
            phi, slope = phi.squeeze(-1), slope.squeeze(-1)
        return _hermite(_of_phi(transfer, phi), transfer.scaling * (slope / transfer.gain))


def fit(
    transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, most: int, least: int
) -> Cubics | None:
    """The first table that is accurate to `tolerance`, see `Cubics.accurate`, from `least` cells on either side of zero
    on; None where there is none of at most `most` cells."""
    basis = transfer.basis
    kinds: list[type[Spline | Table]] = [Table]
    if basis.jumps and basis.argument == "shifted":
        kinds.insert(0, Spline)
    tables = (kind.fit(transfer, radius, tolerance, dtype, most, least) for kind in kinds)
    return next(filter(None, tables), None)


def reach(transfer: Transfer, radius: Tensor) -> Tensor:
    """How far the argument u of the narrowest basis function goes where a table has cells; see `series.reach`."""
    return series.reach(transfer, covered(transfer, radius))


def covered(transfer: Transfer, radius: Tensor) -> Tensor:
    """How far from zero BA may lie and the functions reach, at most R."""
    with torch.no_grad():
        if transfer.basis.argument != "shifted" or math.isinf(transfer.basis.support):
            return radius
        reached = (transfer.grid.double().abs() + transfer.basis.support / transfer.omega.double()).amax()
        return torch.minimum(radius, reached / transfer.gain.double())


def _of_phi(transfer: Transfer, phi: Tensor) -> Tensor:
    """F without its path, of φ."""
    if transfer.centre:
        phi = phi - transfer.phi(transfer.grid.new_zeros(1))
    return transfer.scaling * (phi / transfer.gain)


def _within(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether the error of each column is below the tolerance, relative to its largest entry."""
    return bool(((found - truth).abs().amax(0) <= tolerance * truth.abs().amax(0)).all())


def _beside_a_knot(after: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """At s, Hermite's cubic less (s − knot)₊³ / 6, through whose ends it goes, and its slope less that one's."""
    value, slope, beyond = (1 - after) ** 3 / 6, (1 - after) ** 2 / 2, (s - after).clamp_min(0.0)
    of_value = value * (3 * s**2 - 2 * s**3) + slope * (s**3 - s**2) - beyond**3 / 6
    return of_value, value * (6 * s - 6 * s**2) + slope * (3 * s**2 - 2 * s) - beyond**2 / 2


def _hermite(value: Tensor, slope: Tensor) -> Tensor:
    """The cubics between neighbouring values (n + 1, ...) with these slopes, in powers of s: (n, ..., 4)."""
    rise, first, last = value.diff(dim=0), slope[:-1], slope[1:]
    return torch.stack([value[:-1], first, 3 * rise - 2 * first - last, first + last - 2 * rise], -1)


@functools.cache
def _spacing(basis: type[TransferBasis], tolerance: float) -> float:
    """How far apart the sums may lie for one function alone, in its widths: where to begin with many.

    Also of what is too narrow for its own check to be seen among others.
    """
    spacing = WIDEST
    with torch.inference_mode(False), torch.no_grad():
        one = torch.ones(1, dtype=torch.float64)
        alone = Transfer(basis(), one, one, 0 * one, one[0])
        while spacing > tolerance:
            half = FINE * math.ceil(SEEN / (spacing * max(width(basis), 1e-300)))
            if half > SEEN * MOST_SEEN or Table(alone, SEEN * one[0], half, torch.float64).accurate(tolerance):
                break
            spacing /= CLOSER
    return spacing


@functools.cache
def _lagrange(device: torch.device) -> Tensor:
    """The matrix (NEIGHBOURS, 4 · FINE) from sums at −NEIGHBOURS / 2 + 1 .. NEIGHBOURS / 2 to the cubics on [0, 1]."""
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
