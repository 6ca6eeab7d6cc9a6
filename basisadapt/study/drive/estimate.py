"""Estimates of the run time of missing cells, from cells that have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.training.execution.executor import Executor

SECONDS = ("seconds.train", "seconds.eval", "seconds.observe")  # metrics whose sum is the run time of a cell


@dataclass(frozen=True)
class Estimate:
    """The estimated run time of missing cells.

    seconds: until all of them have ended.
    cells: the number of missing cells.
    recorded: the number of finished cells behind the estimate.
    """

    seconds: float
    cells: int
    recorded: int

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} for {_cells(self.cells)}, by {_cells(self.recorded)} recorded"


def estimate_time(cells: Sequence[Cell], outcomes: Mapping[str, Outcome], executor: Executor) -> Estimate | None:
    """The run time of the missing cells, see `time_left`.

    None if nothing is missing, or no finished cell of this study and preset has a recorded time.
    """
    missing, by_row = [], dict[str, list[float]]()
    for cell in {cell.key: cell for cell in cells}.values():
        outcome = outcomes.get(cell.key)
        if outcome is None or not outcome.done:
            missing.append(cell)
        elif outcome.status == "finished" and "seconds.train" in outcome.metrics:
            by_row.setdefault(cell.row, []).append(run_time(outcome.metrics))
    seconds = time_left([(cell.row, 0.0) for cell in missing], by_row, executor.slots)
    return None if seconds is None else Estimate(seconds, len(missing), sum(map(len, by_row.values())))


def run_time(metrics: Mapping[str, float]) -> float:
    """The run time of a finished cell in seconds, without what its process loads first."""
    return sum(metrics.get(name, 0.0) for name in SECONDS)


def time_left(left: Sequence[tuple[str, float]], took: Mapping[str, Sequence[float]], slots: int) -> float | None:
    """Seconds until the remaining cells have ended; None if nothing is left or nothing has ended.

    left: (row, seconds for which it has run) of each remaining cell.
    took: row to the run times of its ended cells, in seconds.
    slots: the number of cells that run at once.

    A cell takes the mean of its row. For a row without ended cells, it takes the total running time of all cells
    divided by the number of ended ones: of parallel cells the shortest end first, so their mean would be too short.
    """
    ended = sum(map(len, took.values()))
    if not left or not ended:
        return None
    worked = sum(map(sum, took.values())) + sum(since for _, since in left)
    means = {row: sum(seconds) / len(seconds) for row, seconds in took.items()}
    return sum(max(0.0, means.get(row, worked / ended) - since) for row, since in left) / min(slots, len(left))


def duration(seconds: float) -> str:
    """Seconds as text: 42 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
