"""Chooses each module's evaluator (a series, a table or the direct sum) so that it meets the tolerance.

Every module has these guarantees:

- The error of an entry of ΔW = F(BA) is at most the tolerance times the largest entry of F without its path, plus the
  effect of rounding BA to the dtype of the arithmetic. If at most one row in sixteen is far larger than the others
  (`extent.towering`), the guarantee holds for the other rows by themselves, and F is summed directly on the large ones.
- The error of the gradients to α, ω, the grid and the gain is at most ten times the tolerance, relative to their size
  without cancellation.
- If BA is smaller than `extent.SMALLEST`, in units of φ's argument, both are relative to F on a range of that size.
- Outside the range for which an evaluator was made, its values are NaN.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from basisadapt.phi import series, together
from basisadapt.phi.bank import Transfer, index_tensor
from basisadapt.phi.cubic_tables import FINE, Made, fit, reach
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Direct, Evaluator, Series, Split
from basisadapt.phi.extent import MEASURED_ROUNDING, ROUNDING, SMALLEST, Extent, bounds, largest, towering, without
from basisadapt.phi.recorded import Graphs, Recorded

VERIFY_EVERY = 16  # compilations
# Compilations in a row in which nothing was chosen, before they are recorded; 3 is enough. Never by default, before a
# GPU has shown that it pays: `benchmarks/train_step.py --recorded` asks that.
RECORD_AFTER: float = math.inf
MOVED = 1.25  # R has moved if it has grown or shrunk by this factor
# Measured nanoseconds on one CPU core, forward and backward: per entry of BA and term of a series; per entry of BA with
# a table; per cell of a table; per basis function evaluated to make it; per basis function evaluated in a direct sum;
# and the fixed cost of a table.
TERM, ENTRY, CELL, VALUE, DIRECT, ANY = 1.7, 25.0, 60.0, 25.0, 150.0, 2e6
MAX_CELLS = 1 << 20
AGAIN = 0.9  # a new search begins at this share of the cells that the last table needed
REFIT = 1.05  # how far a table's range may grow before it is refitted; its error grows with the fourth power
TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 1e-5}  # below the rounding of the weights that F is added to
FLOAT32_TOLERANCE = 1e-6
DOUBLE_TOLERANCE = 1e-11  # in float64, whatever the settings
LEAST_SHARE = 1 / 8  # the least max |BA| / R for which R may be the bound by norms


Parameters = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Work:
    """M functions to compile, and the factors that they act on.

    - `tables`, `parameters`: the functions of all modules at once, see `series.compile_series`.
    - `single`: makes the function of one module, by its index.
    - `pairs`: A (r, n) and B (m, r) of each module.
    - `gains`: g, shape (M,), float64.
    - `tolerances`: of each module.
    - `slack` (float ≥ 1, default 1): how many times as large the entries of a layer's own BA may be.
    - `alike` (default: each is by itself): a name for each module. On a GPU those of one name all have a series, or
      tables of one size, so that the blocks of a model share a graph of torch.compile.
    - `copies` (default: none): of `parameters`, at this moment.
    """

    tables: series.Tables
    parameters: tuple[Tensor, ...]
    single: Callable[[int], Transfer]
    pairs: Sequence[tuple[Tensor, Tensor]]
    gains: Tensor
    tolerances: tuple[float, ...]
    slack: float = 1.0
    alike: Sequence[str] = ()
    copies: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def functions(self) -> Transfer:
        """All M functions, in float64."""
        return self.tables(*(p.double() for p in self.parameters))

    def entries(self, index: int) -> int:
        """The number of entries of the module's BA."""
        A, B = self.pairs[index]
        return len(B) * A.shape[1]

    @functools.cached_property
    def dtypes(self) -> list[torch.dtype]:
        """The dtype of each module's arithmetic."""
        return [compute_dtype(A) for A, _ in self.pairs]

    @functools.cached_property
    def tolerance(self) -> float | Tensor:
        """The tolerances, shape (M,); one number if all are equal."""
        asked = tuple(map(_tolerance, self.tolerances, self.dtypes))
        return asked[0] if len(set(asked)) == 1 else _sent(asked, self.gains.device)


@dataclass(frozen=True)
class Seen:
    """The state of M modules at the last full inspection.

    - `apart`: the rows of B that are far larger than the others, see `extent.towering`; None if there are none.
    - `measured`: R is max |BA| itself, since the bound by norms is far above it.
    - `radius`: R, shape (M,).
    - `share`: max |BA| / R, shape (M,).
    - `served`: whether a series evaluates the module, shape (M,), bool.
    - `by_series`: the same, on the host.
    - `far`: the largest ω g R for which a table that was made with others is accurate, shape (M,); ∞ without one.
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
    """How a function without a series is evaluated.

    - `kind`: the class of its table; None is the direct sum.
    - `half` (int): the table's cells on either side of zero.
    - `reach` (float): ω g R when it was fitted.
    - `price` (float): its cost, in the unit of TERM.
    """

    kind: type[Made] | None
    half: int
    reach: float
    price: float

    @classmethod
    def to(cls, work: Work, index: int, radius: Tensor, before: Fitted | None) -> Fitted:
        """The smallest accurate table, or the direct sum if that is cheaper. The search begins near `before`'s size."""
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
        """As `to`, for the modules with these indices at once. radius: (M,)."""
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
    """The largest number of cells with which a table can be cheaper than the direct sum."""
    count = work.parameters[0].shape[-1]
    return int(min(DIRECT * work.entries(index) * count / (CELL + VALUE * count / FINE), MAX_CELLS))


def _least(before: Fitted | None, far: float) -> int:
    """The number of cells at which the search for a table begins."""
    if before is None or before.kind is None or not math.isfinite(far):
        return 0
    return int(AGAIN * before.half * min(1.0, far / before.reach))


class Choice:
    """Makes the evaluators of M modules at every compilation, and reuses what the last full inspection found.

    A full inspection determines which rows are far larger than the others, how much of its range BA uses, and whether
    each series equals its function between the nodes too. It is due every VERIFY_EVERY compilations, whenever a range
    has moved, and as soon as a series misses the tolerance. In a training step on a GPU the last two are read one
    compilation late, so that the host does not wait for the running step. A CUDA graph keeps the evaluators with which
    it was captured; the degrees of its series still follow the parameters.

    Between inspections the same kernels run at every compilation. After RECORD_AFTER of these in training on a GPU they
    are recorded.
    """

    def __init__(self) -> None:
        self._points, self._count = series.POINTS[0], 0
        self._seen: Seen | None = None
        self._tables: dict[int, Fitted] = {}  # of modules without a series
        self._together = False  # whether they are made at once, as is quicker on a GPU
        self._answer: tuple[Tensor, Callable[[], object]] | None = None
        self._steady = 0  # compilations since the last choice
        self._recorded: Recorded | None = None
        self._kernels: tuple[Any, ...] = ()  # what decides which ones run between inspections

    def renewed(
        self, make: Callable[[], Work], inputs: Parameters, tables: Parameters
    ) -> tuple[Work, list[Evaluator | Split]]:
        """What `make` returns and its evaluators, without the host's work where that is recorded.

        inputs, tables: return what `make` reads, and that of it which has gradients.
        """
        if self._serves():
            assert self._recorded is not None
            self._count += 1
            degrees = self._read(self._recorded.repeat(), False)
            if all(degrees):
                return self._recorded.rest, self._recorded.evaluators(degrees)
            work = make()
            return work, self._look(work)
        work = make()
        made = self.evaluators(work)
        if self._may_record(work, made):
            self._recorded = self._record(make, inputs, tables)
        return work, made

    def _serves(self) -> bool:
        """Whether what is recorded makes the next evaluators."""
        due = self._count % VERIFY_EVERY == 0
        return (
            self._recorded is not None
            and not due
            and torch.is_grad_enabled()
            and not _capturing()
            and self._recorded.serves()
        )

    def _may_record(self, work: Work, made: Sequence[Evaluator | Split]) -> bool:
        """Whether the last compilation is worth recording."""
        self._steady += 1
        return (
            self._recorded is None
            and self._steady > RECORD_AFTER
            and torch.is_grad_enabled()
            and deferred(work.gains)
            and not _capturing()
            and all(isinstance(evaluator, Series | Row) for evaluator in made)
        )

    def _record(self, make: Callable[[], Work], inputs: Parameters, tables: Parameters) -> Recorded:
        seen = self._seen
        assert seen is not None

        def compile_all() -> tuple[Sequence[Evaluator], Tensor, Work]:
            work = make()
            batch, radius, degrees = self._compile(work, seen)
            made = self._made(work, seen, batch, radius, [1] * len(work.pairs))
            return [one for one in made if isinstance(one, Evaluator)], degrees, work

        return Recorded(compile_all, inputs, tables, Graphs())

    def evaluators(self, work: Work) -> list[Evaluator | Split]:
        """One evaluator per module."""
        capturing = _capturing()
        due = self._count % VERIFY_EVERY == 0 and not capturing
        self._count += not capturing
        if self._seen is None or due:
            return self._look(work)
        batch, radius, found = self._compile(work, self._seen)
        degrees = self._read(found, capturing)
        if not all(degrees):
            return self._look(work)
        return self._made(work, self._seen, batch, radius, degrees)

    def _compile(self, work: Work, seen: Seen) -> tuple[series.SeriesBatch | None, Tensor, Tensor]:
        """All series, R of every module, and its degree, 0 where an inspection is due. The host waits for nothing."""
        extent = _extent(work, seen.apart, seen.measured, seen.share)
        steady = (extent.radius <= MOVED * seen.radius) & (extent.radius * MOVED >= seen.radius)
        if self._together:
            steady &= ~(reach(work.functions(), extent.radius) > seen.far)
        fine, batch = steady | ~extent.radius.isfinite(), None
        if any(seen.by_series):
            batch = series.compile_series(work.tables, work.parameters, extent, self._points, work.tolerance)
            fine &= batch.resolved | ~seen.served
        return batch, extent.radius, torch.where(fine, batch.degree if batch else 1, 0)

    def _look(self, work: Work) -> list[Evaluator | Split]:
        """A full inspection, and the evaluators. The host waits for the device."""
        apart = towering([B for _, B in work.pairs])
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
        # A table is cheaper on a smaller range.
        measured = [far_off or not serves for far_off, serves in zip(measured, by_series, strict=True)]
        now = _extent(work, apart, measured, extent.share)
        fitted = [self._tables.get(index) if self._together else None for index in range(len(apart))]
        far = now.radius.new_tensor([REFIT * f.reach if f and f.kind else math.inf for f in fitted])
        seen = Seen(apart, measured, now.radius, extent.share, served.new_tensor(by_series), by_series, far)
        self._seen = self._followed(seen)
        return self._made(work, self._seen, batch, now.radius, degrees.tolist())

    def _followed(self, seen: Seen) -> Seen:
        """What was seen, in the memory that a recording reads, if the same kernels run for it; else there is none."""
        sizes = {index: (table.kind, table.half) for index, table in self._tables.items()}
        kernels = (seen.measured, seen.by_series, self._points, self._together, sizes)
        recorded, before, self._kernels = self._recorded, self._kernels, kernels
        if recorded is None or kernels != before or any(rows is not None for rows in seen.apart):
            self._recorded, self._steady = None, 0
            return seen
        assert self._seen is not None
        for name in ("radius", "share", "served", "far"):
            getattr(self._seen, name).copy_(getattr(seen, name))
        return self._seen

    def _fit_tables(
        self, work: Work, apart: Sequence[Tensor | None], measured: Sequence[bool], extent: Extent,
        served: list[bool], degrees: list[int],
    ) -> list[bool]:  # fmt: skip
        """Fit a table to every function whose series is missing or may be slower. Returns which keep their series."""
        terms = [TERM * degree * work.entries(index) for index, degree in enumerate(degrees)]
        # On a GPU one kernel sums a series, and no table is as fast.
        long = [not deferred(work.gains) and t > ANY + ENTRY * work.entries(i) for i, t in enumerate(terms)]
        tried = [not serves or is_long for serves, is_long in zip(served, long, strict=True)]
        groups: Sequence[object] = work.alike or range(len(tried))
        need = set(itertools.compress(groups, tried))
        if deferred(work.gains):
            tried = [group in need for group in groups]
        radius = _extent(work, apart, [m or t for m, t in zip(measured, tried, strict=True)], extent.share).radius
        before, self._tables = self._tables, {}
        chosen = [index for index, is_tried in enumerate(tried) if is_tried]
        self._together = bool(chosen) and deferred(work.gains)
        if self._together:
            fitted = zip(chosen, Fitted.together(work, chosen, radius, before), strict=True)
            tables = {index: table for index, table in fitted if table.kind or not served[index]}
            largest = {group: max(t.half for i, t in tables.items() if groups[i] == group) for group in need}
            self._tables = {i: replace(t, half=largest[groups[i]]) for i, t in tables.items()}
        for index in [] if self._together else chosen:
            table = Fitted.to(work, index, radius[index], before.get(index))
            if not served[index] or table.price < terms[index]:
                self._tables[index] = table
        return [index not in self._tables for index in range(len(tried))]

    def _read(self, degrees: Tensor, capturing: bool) -> list[int]:
        """`degrees` on the host; in training on a GPU those of the previous compilation, which are there already."""
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
        """On a CPU: the table of the last inspection, refitted if its range has grown, or the direct sum."""
        transfer, fitted = work.single(index), self._tables[index]
        if not float(reach(transfer, radius)) <= REFIT * fitted.reach:  # NaN too
            fitted = self._tables[index] = Fitted.to(work, index, radius, fitted)
        return fitted.kind(transfer, radius, fitted.half, dtype) if fitted.kind else Direct(transfer)


def _extent(work: Work, apart: Sequence[Tensor | None], measured: Sequence[bool], share: Tensor) -> Extent:
    """The ranges, without the rows `apart`: bounds by norms, or max |BA| where `measured`."""
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
    """The ranges, the share of them that BA reaches, and the modules whose BA has to be measured."""
    everywhere, nowhere = [True] * len(apart), [False] * len(apart)
    whole = torch.ones(len(apart), dtype=torch.float64, device=work.gains.device)
    bound, exact = _extent(work, apart, nowhere, whole), _extent(work, apart, everywhere, whole)
    share = exact.radius / bound.radius
    # In the dtype of the arithmetic, a function's error is an eps of its largest value on the range.
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
    """These numbers on the device, copied there once: a copy makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64, device=device)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def deferred(tensor: Tensor) -> bool:
    """Whether the host would have to wait for the tensor's values."""
    return tensor.device.type != "cpu"


def _send(numbers: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy to the host that is under way, and a function that waits for it."""
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(numbers.device))
    return here, event.synchronize


def _arrived() -> None:
    """Wait for nothing."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which F is computed: float64 for float64, float32 for all narrower ones."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def default_tolerance(weights: torch.dtype) -> float:
    """The tolerance for weights of that dtype, which their rounding hides."""
    return TOLERANCE.get(weights, FLOAT32_TOLERANCE)


def _tolerance(asked: float, dtype: torch.dtype) -> float:
    return DOUBLE_TOLERANCE if dtype == torch.float64 else asked


def evaluator(
    transfer: Transfer, A: Tensor, B: Tensor, backend: str, tolerance: float = FLOAT32_TOLERANCE, slack: float = 1.0
) -> Evaluator | Split:
    """A new evaluator of one function on BA, for A (r, n) and B (m, r). slack: as in `Work`."""
    if backend == "direct":
        return Direct(transfer)
    parameters = tuple(p.unsqueeze(0) for p in transfer.parameters)
    gains = transfer.gain.detach().reshape(1).double()
    work = Work(transfer.with_parameters, parameters, lambda _: transfer, [(A, B)], gains, (tolerance,), slack)
    return Choice().evaluators(work)[0]
