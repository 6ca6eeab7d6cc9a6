"""Series, table or direct: which evaluator serves each module, decided by what the tolerance asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer, index_tensor
from basisadapt.phi.evaluators import Direct, Evaluator, Series, Table

VERIFY_EVERY = 16  # compilations
TOLERANCE = {torch.bfloat16: 1e-4, torch.float16: 1e-5}  # below the rounding of the weights that F is added to
FLOAT32_TOLERANCE = 1e-6
DOUBLE_TOLERANCE = 1e-11  # in float64, whatever is asked
ROUNDING = 1 + 1e-6
SMALLEST = 1e-2  # the smallest range, in units of φ's argument


class Choice:
    """Makes the evaluators of M modules, compilation after compilation, and remembers what proved necessary.

    On a CPU a series that does not reach the tolerance is replaced at once, by a table or by direct evaluation. On a
    GPU the degree is found there, and the answer to whether there is one is read one compilation later: the host
    never waits for the step at work. A CUDA graph keeps the evaluators that served when it was captured; the degrees of
    its series still follow the parameters.
    """

    def __init__(self) -> None:
        self._points, self._count = series.POINTS[0], 0
        self._verified: Tensor | None = None
        self._cells: dict[int, int] = {}
        self._answer: tuple[Tensor, torch.cuda.Event] | None = None

    def evaluators(
        self, tables: series.Tables, parameters: tuple[Tensor, ...], single: Callable[[int], Transfer],
        radius: Tensor, tolerance: float, dtype: torch.dtype,
    ) -> list[Evaluator]:  # fmt: skip
        """One evaluator per module, for arithmetic in `dtype`.

        tables, parameters: the functions of all modules at once, see `series.compile_series`; single: each alone;
        radius: R ≥ max |BA|, (M,), float64, see `radii`.
        """
        tolerance = DOUBLE_TOLERANCE if dtype == torch.float64 else tolerance
        batch, degrees = self._compile(tables, parameters, radius, tolerance)
        columns = zip(batch.coefficients.unbind(), series.pack(batch).to(dtype).unbind(), strict=True)
        return [
            Series(*column, degree) if degree else self._fallback(index, single(index), radius[index], tolerance, dtype)
            for index, (degree, column) in enumerate(zip(self._read(degrees), columns, strict=True))
        ]

    def _compile(
        self, tables: series.Tables, parameters: tuple[Tensor, ...], radius: Tensor, tolerance: float
    ) -> tuple[series.SeriesBatch, Tensor]:
        """The batch of series, and their degrees, zero for the modules that it does not serve."""
        verify = self._count % VERIFY_EVERY == 0 and not _capturing(radius)
        self._count += not _capturing(radius)
        last = series.POINTS[-1]
        if radius.device.type != "cpu":
            batch = series.compile_series(tables, parameters, radius, last, tolerance)
            if verify:
                self._cells.clear()
                self._verified = series.verify(tables, parameters, radius, last, tolerance)
            assert self._verified is not None
            return batch, batch.degree * (batch.resolved & self._verified)
        for points in series.POINTS:
            if points < self._points:
                continue
            batch = series.compile_series(tables, parameters, radius, points, tolerance)
            if points < last and not bool(batch.resolved.all()):
                continue
            if verify or points > self._points:
                self._cells.clear()
                self._verified = series.verify(tables, parameters, radius, points, tolerance)
                if points < last and not bool(self._verified.all()):
                    continue
            break
        assert self._verified is not None
        self._points = points
        return batch, batch.degree * (batch.resolved & self._verified)

    def _read(self, degrees: Tensor) -> list[int]:
        """`degrees`, on a GPU as of the compilation before, whose answer has long arrived; the first is waited for."""
        if degrees.device.type == "cpu":
            return _whole(degrees)
        before = self._answer
        if _capturing(degrees) and before:
            return _whole(before[0])
        here = torch.empty(degrees.shape, dtype=degrees.dtype, pin_memory=True)
        here.copy_(degrees, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(degrees.device))
        self._answer = here, event
        answer, arrived = before or self._answer
        arrived.synchronize()
        return _whole(answer)

    def _fallback(
        self, index: int, transfer: Transfer, radius: Tensor, tolerance: float, dtype: torch.dtype
    ) -> Evaluator:
        """A table of the size that was found accurate when last looked at, or direct evaluation."""
        if index in self._cells:
            cells = self._cells[index]
            return Table(transfer, radius, cells, dtype) if cells else Direct(transfer, dtype)
        table = Table.fit(transfer, radius, tolerance, dtype)
        self._cells[index] = table.cells if table else 0
        return table or Direct(transfer, dtype)


def _whole(numbers: Tensor) -> list[int]:
    return [int(number) for number in numbers.tolist()]


def _capturing(tensor: Tensor) -> bool:
    """Whether what is done now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What F is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def default_tolerance(weights: torch.dtype) -> float:
    """The tolerance over weights of that dtype."""
    return TOLERANCE.get(weights, FLOAT32_TOLERANCE)


def evaluator(
    transfer: Transfer, A: Tensor, B: Tensor, backend: str, tolerance: float = FLOAT32_TOLERANCE
) -> Evaluator:
    """The evaluator of one function on BA, made afresh."""
    dtype = compute_dtype(A)
    if backend == "direct":
        return Direct(transfer, dtype)
    parameters = tuple(p.unsqueeze(0) for p in transfer.parameters)
    radius = radii([(A, B)], transfer.gain)
    return Choice().evaluators(transfer.with_parameters, parameters, lambda _: transfer, radius, tolerance, dtype)[0]


@torch.no_grad()
def radii(pairs: Sequence[tuple[Tensor, Tensor]], gain: Tensor) -> Tensor:
    """R ≥ max |BA| of every pair (A, B), shape (M,), float64: the largest row of B times the largest column of A.

    At least SMALLEST / gain, with gain of shape (M,): that keeps rounding out of F' where BA is zero, as at the start;
    Adam would scale it up. Equal shapes go through together, so that the launches are few.
    """
    largest_a = _largest([A.T for A, _ in pairs])
    largest_b = _largest([B for _, B in pairs])
    return (largest_a * largest_b * ROUNDING).clamp_min(SMALLEST / gain.detach())


def _largest(matrices: list[Tensor]) -> Tensor:
    """The largest norm of a row of each matrix, float64."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(tuple(matrix.shape), []).append(index)
    found = torch.empty(len(matrices), dtype=torch.float64, device=matrices[0].device)
    for members in groups.values():
        stacked = torch.stack([matrices[i] for i in members])
        norms = torch.linalg.vector_norm(stacked, dim=2, dtype=compute_dtype(stacked)).amax(1)
        found[index_tensor(tuple(members), found.device)] = norms.double()
    return found
