"""Series, table or direct: which evaluator serves each module, decided by what the tolerance asks.

What is promised of every module: no entry of ΔW = F(BA) is off by more than the tolerance times the largest entry of F
without its path, beyond what rounding BA to the dtype of the arithmetic does. Where one row in sixteen or fewer towers
over the others (`extent.towering`), that holds for the others by themselves, and of those rows F is summed directly.
The gradients to α, ω, the grid and the gain are off by no more than ten tolerances of what they would be if nothing
cancelled. Beyond the range that it was made for no function is continued.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer
from basisadapt.phi.evaluators import Direct, Evaluator, Series, Split, Table
from basisadapt.phi.extent import MEASURED_ROUNDING, ROUNDING, SMALLEST, Extent, bounds, largest, towering, without

VERIFY_EVERY = 16  # compilations
MOVED = 1.25  # and whenever R has changed by so much, up or down
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
    far off. radius, share: R then, and what part of it BA reached. served, by_series: whether a series does.
    """

    apart: list[Tensor | None]
    measured: list[bool]
    radius: Tensor
    share: Tensor
    served: Tensor
    by_series: list[bool]


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
        self._cells: dict[int, tuple[int, float]] = {}  # of tables, and ω g R when they were chosen; no cells: direct
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
        batch = series.compile_series(work.tables, work.parameters, extent, self._points, work.tolerance)
        steady = (extent.radius <= MOVED * seen.radius) & (extent.radius * MOVED >= seen.radius)
        fine = (steady | ~extent.radius.isfinite()) & (batch.resolved | ~seen.served)
        degrees = self._read(torch.where(fine, batch.degree, 0), capturing)
        if not all(degrees):
            return self._look(work)
        return self._made(work, seen, batch, degrees)

    def _look(self, work: Work) -> list[Evaluator | Split]:
        """The evaluators, with everything found anew; the host waits for what it learns."""
        apart = [towering(B) for _, B in work.pairs]
        extent, measured = _measured(work, apart)
        last = series.POINTS[-1]
        tries = [last] if _deferred(work.gains) else [points for points in series.POINTS if points >= self._points]
        for points in tries:
            batch = series.compile_series(work.tables, work.parameters, extent, points, work.tolerance)
            if points < last and not bool(batch.resolved.all()):
                continue
            verified = series.verify(work.tables, work.parameters, extent.radius, points, work.tolerance)
            if points == last or bool(verified.all()):
                break
        served = batch.resolved & verified
        self._points = points
        self._seen = Seen(apart, measured, extent.radius, extent.share, served, served.tolist())
        self._cells.clear()
        degrees = batch.degree.cpu()
        self._answer = degrees, _arrived
        return self._made(work, self._seen, batch, degrees.tolist())

    def _read(self, degrees: Tensor, capturing: bool) -> list[int]:
        """`degrees`; in training on a GPU as of the compilation before, whose answer has long arrived."""
        before = self._answer
        if not _deferred(degrees) or before is None or not (torch.is_grad_enabled() or capturing):
            return _whole(degrees)
        if not capturing:
            self._answer = _send(degrees)
            before[1]()
        return _whole(before[0])

    def _made(
        self, work: Work, seen: Seen, batch: series.SeriesBatch, degrees: Sequence[int]
    ) -> list[Evaluator | Split]:
        packed, dtypes = series.pack(batch), work.dtypes
        rows = {dtype: packed.to(dtype).unbind() for dtype in set(dtypes)}
        made: list[Evaluator | Split] = []
        for index, (coefficients, dtype) in enumerate(zip(batch.coefficients.unbind(), dtypes, strict=True)):
            main: Evaluator
            if seen.by_series[index]:
                main = Series(coefficients, rows[dtype][index], degrees[index])
            else:
                main = self._fallback(index, work, batch.radius[index], dtype)
            apart = seen.apart[index]
            made.append(main if apart is None else Split(apart, main, Direct(work.single(index))))
        return made

    def _fallback(self, index: int, work: Work, radius: Tensor, dtype: torch.dtype) -> Evaluator:
        """A table of the size that was found accurate when last looked at, or direct evaluation."""
        transfer = work.single(index)
        known = self._cells.get(index)
        if known is None or not (_capturing(radius) or float(series.reach(transfer, radius)) <= REFIT * known[1]):
            A, B = work.pairs[index]
            tolerance = _tolerance(work.tolerances[index], dtype)
            table = Table.fit(transfer, radius, tolerance, dtype, len(B) * A.shape[1])
            self._cells[index] = table.cells if table else 0, float(series.reach(transfer, radius))
            return table or Direct(transfer)
        return Table(transfer, radius, known[0], dtype) if known[0] else Direct(transfer)


def _extent(work: Work, apart: Sequence[Tensor | None], measured: Sequence[bool], share: Tensor) -> Extent:
    """The ranges, without the rows apart, and by BA itself where that is to be measured."""
    pairs = [(A, without(B, rows)) for (A, B), rows in zip(work.pairs, apart, strict=True)]
    radius = bounds(pairs) * work.slack
    zero = radius == 0
    for index, pair in enumerate(pairs):
        if measured[index]:
            found = largest(*pair) * work.slack * ROUNDING + MEASURED_ROUNDING * radius[index]
            radius[index] = torch.minimum(radius[index], found)
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


def _deferred(tensor: Tensor) -> bool:
    """Whether the host would have to wait for the tensor's values."""
    return tensor.device.type != "cpu"


def _send(numbers: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """The numbers on their way to the host, and how to wait for them."""
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
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
