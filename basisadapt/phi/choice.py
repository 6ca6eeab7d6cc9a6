"""Series, table or direct: which evaluator serves each module, decided by what the tolerance asks.

What is promised of every module: no entry of ΔW = F(BA) is off by more than the tolerance times the largest entry of F
without its path, beyond what rounding BA to the dtype of the arithmetic does. Where one row in sixteen or fewer towers
over the others (`extent.towering`), that holds for the others by themselves, and of those rows F is summed directly.
The gradients to α, ω, the grid and the gain are off by no more than ten tolerances of what they would be if nothing
cancelled. Where BA is smaller than `extent.SMALLEST`, in units of φ's argument, all this is relative to F on a range of
that size. Beyond the range that it was made for no function is continued.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.phi import series, together
from basisadapt.phi.bank import Transfer, index_tensor
from basisadapt.phi.cubics import FINE, Made, Row, fit, reach
from basisadapt.phi.evaluators import Direct, Evaluator, Series, Split
from basisadapt.phi.extent import (
    MEASURED_ROUNDING,
    ROUNDING,
    SMALLEST,
    Extent,
    bounds,
    largest,
    towering,
    without,
)

VERIFY_EVERY = 16  # compilations
MOVED = 1.25  # and whenever R has changed by so much, up or down
# Nanoseconds of a CPU's core, forward and backward: an entry of BA in a series, for each term; an entry in a table, its
# cell, a basis function's value on the way to it; such a value in the direct sum; and any table, whatever it holds.
TERM, ENTRY, CELL, VALUE, DIRECT, ANY = 1.7, 25.0, 60.0, 25.0, 150.0, 2e6
MAX_CELLS = 1 << 20
AGAIN = 0.9  # of the cells that were needed before, from where on they are sought again
REFIT = 1.05  # so much further a table may be stretched; its error grows with the fourth power
TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 1e-5}  # below the rounding of the weights that F is added to
FLOAT32_TOLERANCE = 1e-6
DOUBLE_TOLERANCE = 1e-11  # in float64, whatever is asked
LEAST_SHARE = 1 / 8  # of R, which BA has to reach if the bound by norms is to do


@dataclass(frozen=True)
class Work:
    """M functions to compile, and the factors that they act on.

    tables, parameters: the functions of all modules at once, see `series.compile_series`; single: each alone. pairs: A
    and B of each; slack: how many times as large a layer's own may be. gains: g, (M,). tolerances: of each module.
    """

    tables: series.Tables
    parameters: tuple[Tensor, ...]
    single: Callable[[int], Transfer]
    pairs: Sequence[tuple[Tensor, Tensor]]
    gains: Tensor
    tolerances: tuple[float, ...]
    slack: float = 1.0

    @torch.no_grad()
    def functions(self) -> Transfer:
        """All M functions, in float64."""
        return self.tables(*(p.double() for p in self.parameters))

    def entries(self, index: int) -> int:
        """Of BA."""
        A, B = self.pairs[index]
        return len(B) * A.shape[1]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the arithmetic of each module."""
        return [compute_dtype(A) for A, _ in self.pairs]

    @property
    def tolerance(self) -> float | Tensor:
        """One for all where they are equal, else (M,)."""
        asked = tuple(map(_tolerance, self.tolerances, self.dtypes))
        return asked[0] if len(set(asked)) == 1 else _sent(asked, self.gains.device)


@dataclass(frozen=True)
class Seen:
    """What was found of M modules when they were last looked at.

    apart: the rows of B that tower over the others. measured: whether R is max |BA| itself, since the bound by norms is
    far off. radius, share: R then, and what part of it BA reached. served, by_series: whether a series does. far: how
    far ω g R may go until a table that was made together with others is too coarse; infinite where there is none.
    """

    apart: list[Tensor | None]
    measured: list[bool]
    radius: Tensor
    share: Tensor
    served: Tensor
    by_series: list[bool]
    far: Tensor


@dataclass(frozen=True)
class Fitted:
    """What was found to serve a function without a series: a kind of table, or None, the direct sum.

    half: cells on either side of zero. reach: ω g R then. price: see TERM.
    """

    kind: type[Made] | None
    half: int
    reach: float
    price: float

    @classmethod
    def to(cls, work: Work, index: int, radius: Tensor, before: Fitted | None) -> Fitted:
        """The first table that is accurate, from about the size on that `before` had, unless the direct sum is less."""
        transfer, dtype, entries = work.single(index), work.dtypes[index], work.entries(index)
        far = float(reach(transfer, radius))
        table = None
        if math.isfinite(far):
            most, least = _most(work, index), _least(before, far)
            table = fit(transfer, radius, _tolerance(work.tolerances[index], dtype), dtype, most, least)
        if table is None:
            return cls(None, 0, far, DIRECT * entries * transfer.grid.shape[-1])
        price = ANY + ENTRY * entries + CELL * table.cells + VALUE * table.evaluations
        return cls(type(table), table.half, far, price)

    @classmethod
    def together(cls, work: Work, indices: Sequence[int], radius: Tensor, before: Mapping[int, Fitted]) -> list[Fitted]:
        """As `to`, of some modules at once."""
        transfer = together.pick(work.functions(), tuple(indices))
        radius = radius[index_tensor(tuple(indices), radius.device)]
        far = reach(transfer, radius).tolist()
        tolerances = [_tolerance(work.tolerances[index], work.dtypes[index]) for index in indices]
        most = [_most(work, index) for index in indices]
        least = [_least(before.get(index), reached) for index, reached in zip(indices, far, strict=True)]
        found = together.fit(transfer, radius, tolerances, most, least)
        sizes = [table or (None, 0) for table in found]
        return [cls(kind, half, reached, 0.0) for (kind, half), reached in zip(sizes, far, strict=True)]


def _most(work: Work, index: int) -> int:
    """The most cells for which a table may take less than the direct sum."""
    count = work.parameters[0].shape[-1]
    return int(min(DIRECT * work.entries(index) * count / (CELL + VALUE * count / FINE), MAX_CELLS))


def _least(before: Fitted | None, far: float) -> int:
    """From how many cells on a table is sought."""
    if before is None or before.kind is None or not math.isfinite(far):
        return 0
    return int(AGAIN * before.half * min(1.0, far / before.reach))


class Choice:
    """Makes the evaluators of M modules, compilation after compilation, and remembers what proved necessary.

    Now and then, and whenever a range has moved, it looks at everything again: which rows tower, how much of its range
    BA uses, whether a series is its function between the nodes too. A series that does not reach the tolerance in
    between makes it look at once; but in a training step on a GPU that is read one compilation later: the host does not
    wait for the step at work. A CUDA graph keeps the evaluators that served when it was captured; the degrees of its
    series still follow the parameters.
    """

    def __init__(self) -> None:
        self._points, self._count = series.POINTS[0], 0
        self._seen: Seen | None = None
        self._tables: dict[int, Fitted] = {}  # of modules without a series
        self._together = False  # whether they are made at once, as is quicker on a GPU
        self._answer: tuple[Tensor, Callable[[], object]] | None = None

    def evaluators(self, work: Work) -> list[Evaluator | Split]:
        """One evaluator per module."""
        capturing = _capturing(work.gains)
        due = self._count % VERIFY_EVERY == 0 and not capturing
        self._count += not capturing
        if self._seen is None or due:
            return self._look(work)
        seen = self._seen
        extent = _extent(work, seen.apart, seen.measured, seen.share)
        steady = (extent.radius <= MOVED * seen.radius) & (extent.radius * MOVED >= seen.radius)
        if self._together:
            steady &= ~(reach(work.functions(), extent.radius) > seen.far)
        fine, batch = steady | ~extent.radius.isfinite(), None
        if any(seen.by_series):
            batch = series.compile_series(work.tables, work.parameters, extent, self._points, work.tolerance)
            fine &= batch.resolved | ~seen.served
        degrees = self._read(torch.where(fine, batch.degree if batch else 1, 0), capturing)
        if not all(degrees):
            return self._look(work)
        return self._made(work, seen, batch, extent.radius, degrees)

    def _look(self, work: Work) -> list[Evaluator | Split]:
        """The evaluators, with everything found anew; the host waits for what it learns."""
        apart = [towering(B) for _, B in work.pairs]
        extent, measured = _measured(work, apart)
        last = series.POINTS[-1]
        tries = [last] if deferred(work.gains) else [points for points in series.POINTS if points >= self._points]
        for points in tries:
            batch = series.compile_series(work.tables, work.parameters, extent, points, work.tolerance)
            if points < last and not bool(batch.resolved.all()):
                continue
            verified = series.verify(work.tables, work.parameters, extent.radius, points, work.tolerance)
            if points == last or bool(verified.all()):
                break
        served, degrees = batch.resolved & verified, batch.degree.cpu()
        self._points, self._answer = points, (degrees, _arrived)
        by_series = self._fit_tables(work, apart, measured, extent, served.tolist(), degrees.tolist())
        # A table takes less the smaller its range is.
        measured = [far_off or not serves for far_off, serves in zip(measured, by_series, strict=True)]
        now = _extent(work, apart, measured, extent.share)
        fitted = [self._tables.get(index) if self._together else None for index in range(len(apart))]
        far = now.radius.new_tensor([REFIT * f.reach if f and f.kind else math.inf for f in fitted])
        self._seen = Seen(apart, measured, now.radius, extent.share, served.new_tensor(by_series), by_series, far)
        return self._made(work, self._seen, batch, now.radius, degrees.tolist())

    def _fit_tables(
        self, work: Work, apart: Sequence[Tensor | None], measured: Sequence[bool], extent: Extent,
        served: list[bool], degrees: list[int],
    ) -> list[bool]:  # fmt: skip
        """Fit a table to every function that has no series, or one that may take longer; whether each has a series."""
        terms = [TERM * degree * work.entries(index) for index, degree in enumerate(degrees)]
        # On a GPU a series is summed in one kernel, and no table comes near it.
        long = [not deferred(work.gains) and t > ANY + ENTRY * work.entries(i) for i, t in enumerate(terms)]
        tried = [not serves or is_long for serves, is_long in zip(served, long, strict=True)]
        radius = _extent(work, apart, [m or t for m, t in zip(measured, tried, strict=True)], extent.share).radius
        before, self._tables = self._tables, {}
        chosen = [index for index, is_tried in enumerate(tried) if is_tried]
        self._together = bool(chosen) and deferred(work.gains)
        if self._together:
            self._tables = dict(zip(chosen, Fitted.together(work, chosen, radius, before), strict=True))
        for index in [] if self._together else chosen:
            fitted = Fitted.to(work, index, radius[index], before.get(index))
            if not served[index] or fitted.price < terms[index]:
                self._tables[index] = fitted
        return [index not in self._tables for index in range(len(tried))]

    def _read(self, degrees: Tensor, capturing: bool) -> list[int]:
        """`degrees`; in training on a GPU as of the compilation before, whose answer has long arrived."""
        before = self._answer
        if not deferred(degrees) or before is None or not (torch.is_grad_enabled() or capturing):
            return _whole(degrees)
        if not capturing:
            self._answer = _send(degrees)
            before[1]()
        return _whole(before[0])

    def _made(
        self, work: Work, seen: Seen, batch: series.SeriesBatch | None, radius: Tensor, degrees: Sequence[int]
    ) -> list[Evaluator | Split]:
        dtypes = work.dtypes
        if batch:
            packed = series.pack(batch)
            rows = {dtype: packed.to(dtype).unbind() for dtype in set(dtypes)}
            coefficients = batch.coefficients.unbind()
        at_once: dict[int, Row] = {}
        if self._together:
            fitted = {i: (f.kind, f.half, dtypes[i]) for i, f in self._tables.items() if f.kind}
            at_once = together.rows(work.tables, work.parameters, radius, fitted)
        made: list[Evaluator | Split] = []
        for index, dtype in enumerate(dtypes):
            main: Evaluator
            if seen.by_series[index]:
                main = Series(coefficients[index], rows[dtype][index], degrees[index])
            elif index in at_once:
                main = at_once[index]
            elif self._together:
                main = Direct(work.single(index))
            else:
                main = self._fallback(index, work, radius[index], dtype)
            apart = seen.apart[index]
            made.append(main if apart is None else Split(apart, main, Direct(work.single(index))))
        return made

    def _fallback(self, index: int, work: Work, radius: Tensor, dtype: torch.dtype) -> Evaluator:
        """A table of the size that was found accurate when last looked at, or direct evaluation."""
        transfer, fitted = work.single(index), self._tables[index]
        if not (_capturing(radius) or float(reach(transfer, radius)) <= REFIT * fitted.reach):
            fitted = self._tables[index] = Fitted.to(work, index, radius, fitted)
        return fitted.kind(transfer, radius, fitted.half, dtype) if fitted.kind else Direct(transfer)


def _extent(work: Work, apart: Sequence[Tensor | None], measured: Sequence[bool], share: Tensor) -> Extent:
    """The ranges, without the rows apart, and by BA itself where that is to be measured."""
    pairs = [(A, without(B, rows)) for (A, B), rows in zip(work.pairs, apart, strict=True)]
    radius = bounds(pairs) * work.slack
    zero = radius == 0
    chosen = [index for index, is_measured in enumerate(measured) if is_measured]
    if chosen:
        at = index_tensor(tuple(chosen), radius.device)
        found = largest([pairs[index] for index in chosen]) * work.slack * ROUNDING + MEASURED_ROUNDING * radius[at]
        radius[at] = torch.minimum(radius[at], found)
    return Extent(radius.clamp_min(SMALLEST / work.gains.detach()), share, zero)


def _measured(work: Work, apart: Sequence[Tensor | None]) -> tuple[Extent, list[bool]]:
    """The ranges, what part of them BA reaches, and where BA has to be measured."""
    everywhere, nowhere = [True] * len(apart), [False] * len(apart)
    whole = torch.ones(len(apart), dtype=torch.float64, device=work.gains.device)
    bound, exact = _extent(work, apart, nowhere, whole), _extent(work, apart, everywhere, whole)
    share = exact.radius / bound.radius
    # In the dtype of the arithmetic a function is known to an eps of its largest value on the range, no better.
    grown = series.growth(work.tables, work.parameters, bound.radius, exact.radius)
    finest = [torch.finfo(d).eps / _tolerance(t, d) for t, d in zip(work.tolerances, work.dtypes, strict=True)]
    far_off = (share < LEAST_SHARE) | (grown * _sent(tuple(finest), whole.device) > 1)
    radius = torch.where(far_off, exact.radius, bound.radius)
    share = share.masked_fill(far_off | ~share.isfinite(), 1.0)
    return Extent(radius, share, bound.zero), far_off.tolist()


def _whole(numbers: Tensor) -> list[int]:
    return [int(number) for number in numbers.tolist()]


@functools.cache
def _sent(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """These numbers on the device, sent there once: sending makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64, device=device)


def _capturing(tensor: Tensor) -> bool:
    """Whether what is done now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def deferred(tensor: Tensor) -> bool:
    """Whether the host would have to wait for the tensor's values."""
    return tensor.device.type != "cpu"


def _send(numbers: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """The numbers on their way to the host, and how to wait for them."""
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(numbers.device))
    return here, event.synchronize


def _arrived() -> None:
    """There is nothing to wait for."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What F is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def default_tolerance(weights: torch.dtype) -> float:
    """The tolerance over weights of that dtype."""
    return TOLERANCE.get(weights, FLOAT32_TOLERANCE)


def _tolerance(asked: float, dtype: torch.dtype) -> float:
    return DOUBLE_TOLERANCE if dtype == torch.float64 else asked


def evaluator(
    transfer: Transfer, A: Tensor, B: Tensor, backend: str, tolerance: float = FLOAT32_TOLERANCE, slack: float = 1.0
) -> Evaluator | Split:
    """The evaluator of one function on BA, made afresh."""
    if backend == "direct":
        return Direct(transfer)
    parameters = tuple(p.unsqueeze(0) for p in transfer.parameters)
    gains = transfer.gain.detach().reshape(1).double()
    work = Work(transfer.with_parameters, parameters, lambda _: transfer, [(A, B)], gains, (tolerance,), slack)
    return Choice().evaluators(work)[0]
