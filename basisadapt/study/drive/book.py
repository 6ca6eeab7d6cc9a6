"""Running cells in both stores. MLflow decides which cells are done; Optuna mirrors it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception

from basisadapt.core.errors import one_line
from basisadapt.diagnostics.figures import pictures
from basisadapt.study.drive.callback import Callbacks
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.record.record import LostRunError, Record
from basisadapt.study.record.stores import is_stores_fault
from basisadapt.study.record.trials import Trials
from basisadapt.training import RunResult
from basisadapt.training.execution.executor import Ended


@dataclass(frozen=True)
class _Running:
    """A running cell with its MLflow run and its Optuna trial."""

    cell: Cell
    run_id: str
    trial: int


class Book:
    """The running cells of an invocation, by key.

    parent: the id of the invocation's run.
    callbacks: called as each cell ends.
    adapters: see `JobSettings`.
    """

    def __init__(
        self, record: Record, trials: Trials, parent: str, callbacks: Callbacks, adapters: Path | None = None
    ) -> None:
        self.running: dict[str, _Running] = {}
        self._record, self._trials, self._parent = record, trials, parent
        self._callbacks, self._adapters = callbacks, adapters

    def close_orphans(self) -> None:
        """Close the runs and trials that dead processes left open."""
        self._trials.close_orphans(self._record.close_orphans, self._record.outcomes)

    @property
    def run_ids(self) -> list[str]:
        """The runs of the invocation and of its running cells."""
        return [self._parent, *(at.run_id for at in list(self.running.values()))]

    def start(self, cell: Cell, waits: Callable[[], None]) -> bool:
        """Start a cell. False if it is done, or another process runs it. waits: see `Record.start`."""
        run_id = self._record.start(self._parent, cell, waits)
        if run_id is None:
            return False
        self.running[cell.key] = _Running(cell, run_id, self._trials.ask(cell, run_id))
        return True

    def finish(self, ended: Ended) -> str | None:
        """Record the end of a cell. Returns it in words; None if another process has closed its run."""
        at = self.running[ended.key]
        status, value, said = self._end(at, ended)
        del self.running[ended.key]  # even if the trial cannot be told
        self._trials.tell(at.trial, status, value)
        return said

    def _end(self, at: _Running, ended: Ended) -> tuple[str, float | None, str | None]:
        """Write the end of a cell to MLflow. Returns its status, its value, and what `finish` returns."""
        result, error, traceback = ended.result, ended.error, ended.traceback
        if result is not None:
            folder = None if self._adapters is None else self._adapters / at.cell.key
            adapter = folder if folder is not None and folder.is_dir() else None
            try:
                self._record.finish(at.run_id, at.cell, result, draw(at.cell, result), adapter=adapter)
            except LostRunError:
                return "killed", None, None
            except Exception as reason:  # a bad result fails its own cell only
                if is_stores_fault(reason):
                    raise
                error, traceback = one_line(reason), "".join(format_exception(reason))
            else:
                value = result.metrics[result.headline] if result.status == "finished" else None
                self._callbacks.on_end(at.cell, result, "")
                return result.status, value, result.status if value is None else f"{result.headline} {value:.4f}"
            finally:
                if adapter is not None:
                    shutil.rmtree(adapter, ignore_errors=True)
        self._record.fail(at.run_id, error, traceback)
        self._callbacks.on_end(at.cell, None, error)
        return "failed", None, f"failed: {error}"

    def cut_off(self, key: str, reason: str) -> Cell:
        """Record a cell whose process was stopped as killed, and return it."""
        at = self.running.pop(key)
        self._record.cut_off(at.run_id, reason)
        self._trials.tell(at.trial, "killed")
        return at.cell

    def of_others(self, cells: Collection[Cell]) -> tuple[list[Cell], list[Cell]]:
        """The cells that other processes still run, and those that they gave up."""
        self._record.close_orphans()
        outcomes = self._record.outcomes()
        missing = missing_cells(cells, outcomes)
        busy = [cell for cell in missing if cell.key in outcomes and outcomes[cell.key].busy]
        return busy, [cell for cell in missing if cell not in busy]


def missing_cells(cells: Iterable[Cell], outcomes: Mapping[str, Outcome]) -> list[Cell]:
    """The cells that are not done, each once."""
    once = {cell.key: cell for cell in cells}
    return [cell for key, cell in once.items() if key not in outcomes or not outcomes[key].done]


def draw(cell: Cell, result: RunResult) -> dict[str, bytes]:
    """The pictures of a result, file name to PNG."""
    return pictures(f"{cell.row}, seed {cell.seed}", vars(result))
