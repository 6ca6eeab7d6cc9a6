"""The ways to evaluate a transfer function F on a matrix, and to pull a gradient back through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer
from basisadapt.phi.basis import width

CELLS = (2048, 8192, 32768)  # sizes of a table that are tried
SLOPE = 8  # a table's tolerance for F', as a multiple: its error sits in the few cells where F'' has a kink
PLACES = ((0.5, False), (0.8, True))  # in a cell, where a table is checked, and whether of F' too, off towards the ends
HOPELESS = 2.0  # times as wide a cell as a smooth function of the basis' width needs
BEYOND = 1 + 1e-4  # R: what rounding may add to |z|, and not more
FIXED_POINT = 1 << 36  # one unit of the largest gradient: room for 2^26 summands in 62 bits
NODES_AT_ONCE = 1 << 21


class Evaluator(ABC):
    """F on a matrix, and its pullback. `parameters` are the tensors that gradients flow to.

    What is made for ±R gives NaN beyond it, and is not continued: a function that is older than the factors is seen.
    """

    parameters: tuple[Tensor, ...]
    width: int  # numbers held per element

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room to work in for up to `count` elements, to be passed to the methods below."""
        return like.new_empty(0)

    @abstractmethod
    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z), shape of z."""

    @abstractmethod
    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and sums over the elements from which `gradients` follow; they add up over pieces."""

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of Σ gradient · F(z) to the parameters."""
        return sums


class Series(Evaluator):
    """One module's series of a compiled batch.

    coefficients: (P + POWER_COUNT,), float64, with gradients: those of T_d(z / R), of which the first D are used, and
    behind them those of powers (see `series.with_powers`); a gradient may come to either. packed: (PACKED,), the same
    in the dtype of the arithmetic, and what belongs to it, in the layout of `series.pack`; on the device of the
    weights, from where D is read only if this evaluator itself does the work. expected: what D is likely to be, known
    without asking a GPU.
    """

    def __init__(self, coefficients: Tensor, packed: Tensor, expected: int) -> None:
        self.parameters = (coefficients,)
        self.packed, self.expected = packed, expected
        self._known_width: int | None = None
        self._signed: Tensor | None = None

    @property
    def width(self) -> int:  # type: ignore[override]
        """D."""
        if self._known_width is None:
            self._known_width = int(self.packed[0])
        return self._known_width

    def _rows(self) -> Tensor:
        """The coefficients of F and F' against `_polynomials`, shape (2, D)."""
        if self._signed is None:
            rows = [self.packed[start : start + self.width] for start in (series.VALUES, series.SLOPES)]
            self._signed = torch.stack(rows) * _signs(self.width, self.packed)
        return self._signed

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room for D polynomials: making it anew for every piece would cost as much as filling it."""
        room = like.new_empty(self.width, count)
        room[0] = 1
        return room

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        return (self._rows()[0] @ _polynomials(z, self.packed[1], room)).view_as(z)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and the moments of the gradient."""
        polynomials = _polynomials(z, self.packed[1], room)
        value, slope = (self._rows() @ polynomials).view(2, *z.shape)
        moments = (polynomials @ gradient.flatten()).double() * _signs(self.width, self.parameters[0])
        beyond = len(self.parameters[0]) - self.width
        return value, slope.mul_(gradient), (functional.pad(moments, (0, beyond)),)


def _polynomials(z: Tensor, scale: Tensor, room: Tensor) -> Tensor:
    """±T_0(t) .. ±T_{D−1}(t) at t = scale · z, |t| ≤ 1, with the signs of `_signs`; shape (D, n), in `room`.

    The signs + + − − + + − − … turn T_d = 2t T_{d−1} − T_{d−2} into one fused multiply-add into place.
    """
    polynomials = room[:, : z.numel()]
    row = polynomials.unbind()
    torch.mul(z.flatten(), scale, out=row[1])
    _spoil_beyond(row[1])
    twice = 2 * row[1]
    for d in range(2, len(row)):
        torch.addcmul(row[d - 2], twice, row[d - 1], value=-1 if d % 2 == 0 else 1, out=row[d])
    return polynomials


def _spoil_beyond(t: Tensor) -> None:
    """Make NaN of every t that is not on [−1, 1], in place."""
    # On a CPU one reading pass tells that there is none, as a rule; elsewhere the host does not ask.
    if t.device.type == "cpu":
        least, most = torch.aminmax(t)
        if least.item() >= -BEYOND and most.item() <= BEYOND:
            return
    t.masked_fill_(~(t.abs() <= BEYOND), float("nan"))


def _signs(degree: int, like: Tensor) -> Tensor:
    return like.new_tensor([1.0 if d % 4 < 2 else -1.0 for d in range(degree)])


class Table(Evaluator):
    """F as one cubic in each of many equal cells of [−R, R]: for functions whose series is long.

    In a cell with the local coordinate s in [0, 1], F ≈ p_0 + p_1 s + p_2 s² + p_3 s³ is the cubic through F at the
    four nearest nodes (Lagrange).
    """

    width = 12

    def __init__(self, transfer: Transfer, radius: Tensor, cells: int, dtype: torch.dtype) -> None:
        self.parameters = transfer.parameters
        self._transfer, self._radius, self._cells = transfer.double(), radius.double(), cells
        with torch.no_grad():
            self._cubics = torch.cat(list(self._build(self._transfer))).to(dtype)
        self._scale = cells / (2 * self._radius)

    @staticmethod
    def fit(transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype, entries: int) -> Table | None:
        """The smallest table that is accurate to `tolerance`, see `accurate`; None if there is none, or none with fewer
        cells than the matrix has entries, for which direct evaluation takes less."""
        reached = float(series.reach(transfer, radius)) / max(width(type(transfer.basis)), 1e-300)
        for cells in CELLS:
            # The cubic's slope is off by h³/12 on a cell of h widths. A check might see nothing of functions that are
            # narrower than a cell, and of others it would take long to say the same.
            h = 2 * reached / cells
            if cells > entries or not h <= HOPELESS * (12 * SLOPE * tolerance) ** (1 / 3):
                continue
            table = Table(transfer, radius, cells, dtype)
            if table.accurate(tolerance):
                return table
        return None

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return self._cells

    def accurate(self, tolerance: float) -> bool:
        """Whether F without its path and a probe, and their slopes, are within the tolerance at PLACES of every cell.

        As of a series, see `series.compile_series`: next to BA the part that trains may be small, or zero, and its
        gradients have to be right all the same. Relative to the largest value of each.
        """
        both = series.with_probe(self._transfer)
        found = torch.zeros(2, 4, dtype=torch.float64, device=self._radius.device)
        error, size = found  # of F, the probe and their slopes
        for first, cubics in zip(range(0, self._cells, self._chunk), self._build(both), strict=True):
            cubics = cubics.detach()
            place = torch.arange(len(cubics), dtype=torch.float64, device=self._radius.device) + first
            for s, of_slope in PLACES:
                z = (self._radius * (2 * (place + s) / self._cells - 1)).detach().requires_grad_(of_slope)
                made = cubics @ cubics.new_tensor([1, s, s**2, s**3])
                with torch.set_grad_enabled(of_slope):
                    truth = both(z)
                    slopes = [
                        torch.autograd.grad(f.sum(), z, retain_graph=True)[0] for f in truth.unbind(-1) if of_slope
                    ]
                truth = truth.detach()
                if of_slope:
                    rates = cubics.new_tensor([0, 1, 2 * s, 3 * s**2]) * (self._cells / (2 * self._radius))
                    made, truth = torch.cat([made, cubics @ rates], -1), torch.cat([truth, torch.stack(slopes, -1)], -1)
                held = slice(made.shape[-1])
                error[held] = torch.maximum(error[held], (made - truth).abs().amax(0))
                size[held] = torch.maximum(size[held], truth.abs().amax(0))
        allowed = size.new_tensor([1, 1, SLOPE, SLOPE]) * tolerance
        return bool((error <= allowed * size).all())

    @property
    def _chunk(self) -> int:
        return max(1, NODES_AT_ONCE // self._transfer.grid.shape[-1])

    def _build(self, transfer: Transfer) -> list[Tensor]:
        """The cubics (n, 4), or (n, k, 4) of k functions side by side, of successive chunks of cells."""
        return [self._some(transfer, first) for first in range(0, self._cells, self._chunk)]

    def _some(self, transfer: Transfer, first: int) -> Tensor:
        count = min(self._chunk, self._cells - first)
        node = torch.arange(first - 1, first + count + 2, dtype=torch.float64, device=self._radius.device)
        values = transfer(self._radius * (2 * node / self._cells - 1))
        # Lagrange's cubic through s = −1, 0, 1, 2, in powers of s.
        lagrange = values.new_tensor(
            [[0, 1, 0, 0], [-1 / 3, -1 / 2, 1, -1 / 6], [1 / 2, -1, 1 / 2, 0], [-1 / 6, 1 / 2, -1 / 2, 1 / 6]]
        )
        return values.unfold(0, 4, 1) @ lagrange.T

    def _locate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each element and the place in it."""
        place = z.double() * self._scale + self._cells / 2  # float32 would round by a part of a cell
        cell = place.nan_to_num(0.0).long().clamp_(0, self._cells - 1)
        s = (place - cell).to(z.dtype)
        slack = (BEYOND - 1) * self._cells
        return cell, s.masked_fill_((s < -slack) | (s > 1 + slack), float("nan"))

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        cell, s = self._locate(z)
        p = self._cubics[cell].unbind(-1)
        return p[0] + s * (p[1] + s * (p[2] + s * p[3]))

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and Σ gradient · s^k in every cell."""
        cell, s = self._locate(z)
        p = self._cubics[cell].unbind(-1)
        value = p[0] + s * (p[1] + s * (p[2] + s * p[3]))
        slope = (p[1] + s * (2 * p[2] + s * (3 * p[3]))) * self._scale.to(z.dtype)
        # Whole numbers add up to the same sum in every order, so that the result repeats bit for bit on a GPU too.
        unit = FIXED_POINT / gradient.abs().max().double().clamp_min(1e-300)
        sums = torch.zeros(4, self._cells, dtype=torch.int64, device=z.device)
        weighted, place = gradient.double() * unit, s.double()
        for row in sums:
            row.index_add_(0, cell.flatten(), weighted.nan_to_num().round().long().flatten())
            weighted = weighted * place
        return value, slope * gradient, (sums.double().T / unit,)

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Through the cubics to α, ω and the grid, some cells at a time."""
        totals = [torch.zeros_like(p) for p in self._transfer.parameters]
        for first in range(0, self._cells, self._chunk):
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_() for p in self._transfer.parameters]
                cubics = self._some(self._transfer.with_parameters(*leaves), first)
                upstream = sums[0][first : first + len(cubics)]
                grads = torch.autograd.grad(cubics, leaves, upstream, allow_unused=True)
            for total, grad in zip(totals, grads, strict=True):
                total += 0 if grad is None else grad
        return tuple(totals)


class Direct(Evaluator):
    """F from its N basis functions, in float64: the reference that every faster evaluator is tested against."""

    def __init__(self, transfer: Transfer) -> None:
        self.parameters = transfer.parameters
        self.width = 8 * len(transfer.alpha)  # float64 is twice as wide
        self._transfer = transfer.with_parameters(*(p.detach().double() for p in transfer.parameters))

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        return self._transfer(z.double()).to(z.dtype)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and the gradients to α, ω and the grid, by autograd over this piece alone."""
        with torch.enable_grad():
            inputs = [t.detach().double().requires_grad_() for t in (z, *self._transfer.parameters)]
            value = self._transfer.with_parameters(*inputs[1:])(inputs[0])
            slope, *rest = torch.autograd.grad(value, inputs, gradient.double(), allow_unused=True)
        grads = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(rest, inputs[1:], strict=True))
        slope = torch.zeros_like(z) if slope is None else slope.to(z.dtype)
        return value.detach().to(z.dtype), slope, grads


@dataclass(frozen=True)
class Split:
    """Two evaluators of one function: `apart` for these rows of BA, which tower over the others, `main` for those."""

    rows: Tensor
    main: Evaluator
    apart: Evaluator

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Those of both."""
        return self.main.parameters + self.apart.parameters
