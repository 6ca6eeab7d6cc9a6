"""How long a study's missing cells may take, by those that are recorded or have just ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from basisadapt.study.outcome import Outcome
    from basisadapt.study.plan.cells import Cell
    from basisadapt.training.execution.executor import Executor

SECONDS = ("seconds.train", "seconds.eval", "seconds.observe")  # what a cell's time is made of


@dataclass(frozen=True)
class Estimate:
    """seconds: until the `cells` that are missing have ended. recorded: how many finished cells say so."""

    seconds: float
    cells: int
    recorded: int

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} for {_cells(self.cells)}, by {_cells(self.recorded)} recorded"


def estimate_time(cells: Sequence[Cell], outcomes: Mapping[str, Outcome], executor: Executor) -> Estimate | None:
    """Each missing cell at the mean of its row's finished ones, or of all where its row has none, over the slots.

    None where nothing is missing, or none of these cells is recorded with its time: another preset's say nothing.
    """
    missing, by_row = [], dict[str, list[float]]()
    for cell in {cell.key: cell for cell in cells}.values():
        outcome = outcomes.get(cell.key)
        if outcome is None or not outcome.done:
            missing.append(cell)
        elif outcome.status == "finished" and "seconds.train" in outcome.metrics:
            by_row.setdefault(cell.row, []).append(sum(outcome.metrics.get(name, 0.0) for name in SECONDS))
    seconds = time_left([(cell.row, 0.0) for cell in missing], by_row, executor.slots)
    return None if seconds is None else Estimate(seconds, len(missing), sum(map(len, by_row.values())))


def time_left(left: Sequence[tuple[str, float]], took: Mapping[str, Sequence[float]], slots: int) -> float | None:
    """Seconds until all that is left has ended, in so many slots. None where nothing is left or nothing has ended.

    left: of each cell its row, and for how many seconds it has been at work. took: a row to the seconds of those of its
    cells that have ended. A row of which none has is taken for what cells have worked, in all, for each that has ended:
    of cells that run at once the shortest end first, and their mean would be too short.
    """
    ended = sum(map(len, took.values()))
    if not left or not ended:
        return None
    worked = sum(map(sum, took.values())) + sum(since for _, since in left)
    means = {row: sum(seconds) / len(seconds) for row, seconds in took.items()}
    return sum(max(0.0, means.get(row, worked / ended) - since) for row, since in left) / min(slots, len(left))


def duration(seconds: float) -> str:
    """Seconds as they are told."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
