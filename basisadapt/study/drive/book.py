"""Cells at work, in both stores: MLflow, which has the last word on what is done, and Optuna, which follows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception
from typing import TYPE_CHECKING

from basisadapt.core.errors import one_line
from basisadapt.diagnostics.figures import pictures
from basisadapt.study.drive.callback import Callbacks
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.record.record import LostRunError, Record
from basisadapt.study.record.stores import is_stores_fault
from basisadapt.study.record.trials import Trials
from basisadapt.training.execution.executor import Ended

if TYPE_CHECKING:
    from basisadapt.training import RunResult


@dataclass(frozen=True)
class _Running:
    """A cell at work, with its run in MLflow and its trial of Optuna."""

    cell: Cell
    run_id: str
    trial: int


class Book:
    """The cells of an invocation that are at work, by their keys.

    parent: its run. callbacks: are told how cells end. adapters: see `JobSettings`.
    """

    def __init__(
        self, record: Record, trials: Trials, parent: str, callbacks: Callbacks, adapters: Path | None = None
    ) -> None:
        self.running: dict[str, _Running] = {}
        self._record, self._trials, self._parent = record, trials, parent
        self._callbacks, self._adapters = callbacks, adapters

    def close_orphans(self) -> None:
        """Close what processes that are gone have left open."""
        self._trials.close_orphans(self._record.close_orphans, self._record.outcomes)

    @property
    def run_ids(self) -> list[str]:
        """The runs of the cells that are at work, and the invocation's."""
        return [self._parent, *(at.run_id for at in list(self.running.values()))]

    def start(self, cell: Cell, waits: Callable[[], None]) -> bool:
        """Begin a cell. False if it is done, or another process is at it. waits: see `Record.start`."""
        run_id = self._record.start(self._parent, cell, waits)
        if run_id is None:
            return False
        self.running[cell.key] = _Running(cell, run_id, self._trials.ask(cell, run_id))
        return True

    def finish(self, ended: Ended) -> str | None:
        """Record how a cell ended, which is then not at work any more. Returns that in words; None if it was lost."""
        at = self.running[ended.key]
        status, value, said = self._end(at, ended)
        del self.running[ended.key]  # whatever becomes of the trial
        self._trials.tell(at.trial, status, value)
        return said

    def _end(self, at: _Running, ended: Ended) -> tuple[str, float | None, str | None]:
        """Write to MLflow how a cell ended. Returns its status, its value, and what `finish` does."""
        result, error, traceback = ended.result, ended.error, ended.traceback
        if result is not None:
            try:
                with self._adapter_of(at.cell) as adapter:
                    self._record.finish(at.run_id, at.cell, result, draw(at.cell, result), adapter=adapter)
            except LostRunError:
                return "killed", None, None
            except Exception as reason:  # whatever a result is like, the other cells go on
                if is_stores_fault(reason):
                    raise
                error, traceback = one_line(reason), "".join(format_exception(reason))
            else:
                value = result.metrics[result.headline] if result.status == "finished" else None
                self._callbacks.on_end(at.cell, result, "")
                return result.status, value, result.status if value is None else f"{result.headline} {value:.4f}"
        self._record.fail(at.run_id, error, traceback)
        self._callbacks.on_end(at.cell, None, error)
        return "failed", None, f"failed: {error}"

    @contextmanager
    def _adapter_of(self, cell: Cell) -> Iterator[Path | None]:
        """Where the cell's adapter lies, if it is to be kept; it does not stay there."""
        folder = None if self._adapters is None else self._adapters / cell.key
        if folder is None or not folder.is_dir():
            yield None
            return
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def cut_off(self, key: str, reason: str) -> Cell:
        """Close a cell that was ended on the way, and return it."""
        at = self.running.pop(key)
        self._record.cut_off(at.run_id, reason)
        self._trials.tell(at.trial, "killed")
        return at.cell

    def of_others(self, cells: Collection[Cell]) -> tuple[list[Cell], list[Cell]]:
        """Of cells that other processes had, those that they are still at, and those that they have left."""
        self._record.close_orphans()
        outcomes = self._record.outcomes()
        missing = missing_cells(cells, outcomes)
        busy = [cell for cell in missing if cell.key in outcomes and outcomes[cell.key].busy]
        return busy, [cell for cell in missing if cell not in busy]


def missing_cells(cells: Iterable[Cell], outcomes: Mapping[str, Outcome]) -> list[Cell]:
    """Those of the cells that are not done, each once."""
    once = {cell.key: cell for cell in cells}
    return [cell for key, cell in once.items() if key not in outcomes or not outcomes[key].done]


def draw(cell: Cell, result: RunResult) -> dict[str, bytes]:
    """The pictures of a result, name to PNG file."""
    return pictures(f"{cell.row}, seed {cell.seed}", vars(result))
