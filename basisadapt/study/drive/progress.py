"""The progress display: a line per ended cell, and a bar if stderr is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from basisadapt.core.command import tell
from basisadapt.core.grouping import grouped
from basisadapt.study.drive.estimate import duration, run_time, time_left
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell, Row, Study
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.report.table import build_table
from basisadapt.study.report.text import standing
from basisadapt.training import RunResult

MIN_ENDED = 3  # cells, before an estimate of the remaining time is shown


class Standing:
    """The differences of rows to their references, from recorded cells and those that have ended since."""

    def __init__(self, spec: StudySpec, rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> None:
        self._spec, self._outcomes = spec, dict(outcomes)
        self._rows = {cell.key: row for row in reversed(rows) for cell in row.cells}
        self._groups = grouped((row.group, row) for row in rows)

    def after(self, cell: Cell, result: RunResult | None) -> str:
        """The difference of a cell's row after the cell has ended, see `text.standing`."""
        row = self._rows.get(cell.key)
        if row is None or result is None:
            return ""
        self._outcomes[cell.key] = Outcome("", cell.key, result.status, result.headline, result.metrics, (), "")
        study = Study(self._spec, tuple(self._groups[row.group]))
        return standing(build_table(study, self._outcomes), row.label)


@dataclass
class _Running:
    name: str
    began: float
    loads: bool  # its process has run no cell before
    step: str = ""


class Progress:
    """Counts the ended cells of a call and shows the running ones.

    missing: the cells to run.
    done: the number of cells that were done before.
    slots: how many cells run at once.
    standing: the differences of rows.
    """

    def __init__(self, missing: Sequence[Cell], done: int, slots: int, standing: Standing) -> None:
        self._file, self._slots, self._standing = _Stderr(), slots, standing
        self._count, self._total = done, done + len(missing)
        shown = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}"
        self._bar = tqdm(
            total=self._total, initial=done, bar_format=shown, file=self._file, disable=not sys.stderr.isatty()
        )
        self._left = {cell.key: cell for cell in missing}
        self._took: dict[str, list[float]] = {}
        self._running: dict[str, _Running] = {}
        self._begun = 0
        self._waiting = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, cell: Cell) -> None:
        """A cell has started."""
        self._running[cell.key] = _Running(_name(cell), time.monotonic(), loads=self._begun < self._slots)
        self._begun += 1
        self._show()

    def step(self, key: str, step: int, total: int) -> None:
        """The cell with this key has finished a training step of `total`; at step 0 its process has started."""
        if step == 0:
            self._running[key].began = time.monotonic()
            return
        self._running[key].step = f" {step}/{total}"
        self._show()

    def drop(self, cell: Cell, reason: str) -> None:
        """A cell runs here no more, and has not ended, for `reason`."""
        del self._running[cell.key]
        self._say(f"{_name(cell)}: {reason}")

    def end(self, cell: Cell, shown: str, result: RunResult | None) -> None:
        """A cell has ended: print its row's difference and the remaining time. result: None if it failed."""
        running = self._running.pop(cell.key)
        seconds = time.monotonic() - running.began
        # The backbone and the data are loaded once: a row's other cells will not take as long as the first.
        again = run_time(result.metrics) if running.loads and result is not None else seconds
        self._took.setdefault(cell.row, []).append(again)
        self._ended(cell, f"{shown}{self._standing.after(cell, result)} ({seconds:.0f} s)")

    def wait(self, cell: Cell) -> None:
        """Wait until another process claims, gives up or finishes a cell."""
        text = waiting_for(cell)
        if self._bar.disable and text != self._waiting:
            self._say(text)
        self._waiting = text
        self._bar.set_description_str(text)

    def end_elsewhere(self, cell: Cell) -> None:
        """Another process has finished a cell."""
        self._ended(cell, "finished by another process")

    def _ended(self, cell: Cell, text: str) -> None:
        self._left.pop(cell.key, None)
        self._count += 1
        self._bar.update()
        self._say(f"[{self._count}/{self._total}] {_name(cell)}: {text}{self._time_left()}")

    def _time_left(self) -> str:
        if sum(map(len, self._took.values())) < MIN_ENDED:
            return ""
        now = time.monotonic()
        began = {key: running.began for key, running in self._running.items()}
        left = [(cell.row, now - began.get(key, now)) for key, cell in self._left.items()]
        seconds = time_left(left, self._took, self._slots)
        return "" if seconds is None else f", about {duration(seconds)} left"

    def _show(self) -> None:
        self._bar.set_description_str("; ".join(running.name + running.step for running in self._running.values()))

    def _say(self, text: str) -> None:
        self._bar.write(text, file=self._file)


class _Stderr:
    """A file that writes to stderr with `tell`."""

    def write(self, text: str) -> None:
        """Write the text."""
        tell(text, end="")

    def flush(self) -> None:
        """Do nothing: `tell` has written the text."""


def waiting_for(cell: Cell) -> str:
    """The message while another process runs a cell."""
    return f"waiting for another process to finish {_name(cell)}"


def _name(cell: Cell) -> str:
    return f"{cell.row}, seed {cell.seed}"
