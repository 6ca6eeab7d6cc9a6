"""How long a study's missing cells may take, by those that are recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basisadapt.study import statistics

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
        return f"about {_duration(self.seconds)} for {_cells(self.cells)}, by {_cells(self.recorded)} recorded"


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
    every = [seconds for of_row in by_row.values() for seconds in of_row]
    if not missing or not every:
        return None
    means = [statistics.mean(by_row.get(cell.row, every)) or 0.0 for cell in missing]
    return Estimate(sum(means) / min(executor.slots, len(missing)), len(missing), len(every))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
