"""The loop that keeps the slots of an executor full until no cell is left."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from basisadapt.study.drive.book import Book
from basisadapt.study.drive.interrupt import Interrupt
from basisadapt.study.drive.progress import Progress
from basisadapt.study.plan.cells import Cell
from basisadapt.study.record.client import few_retries
from basisadapt.study.record.stores import store_errors
from basisadapt.training.execution.executor import Ended, Executor, Job

POLL_SECONDS = 2.0  # between checks of a cell that another process runs


class Loop:
    """Runs cells, and waits for those that other processes run. A cell whose process dies is retried once."""

    def __init__(
        self, cells: Iterable[Cell], book: Book, executor: Executor, interrupt: Interrupt, progress: Progress
    ) -> None:
        self._waiting, self._elsewhere = collections.deque(cells), list[Cell]()
        self._over, self._once_cut_off = list[Ended](), set[str]()
        self._book, self._executor, self._interrupt, self._progress = book, executor, interrupt, progress

    def run(self) -> None:
        """Run the cells.

        Raises KeyboardInterrupt: after the first Ctrl-C once the running cells have ended, after the second at once,
        and then records the running cells as killed.
        """
        try:
            while self._waiting or self._book.running or self._elsewhere:
                self._fill()  # first: recording an ended cell takes a second
                if self._over:
                    self._record(self._over.pop())
                elif self._book.running:
                    self._wait()
                elif self._interrupt.asked:
                    raise KeyboardInterrupt
                else:
                    self._look_elsewhere()
        except BaseException:
            with self._interrupt.held(), few_retries():
                self._executor.stop()
                # If the stores failed, the next call closes the open runs.
                with suppress(*store_errors()):
                    for key in list(self._book.running):
                        self._book.cut_off(key, "")
            raise
        finally:
            self._book.running.clear()
        if self._interrupt.asked:
            raise KeyboardInterrupt

    def _fill(self) -> None:
        """Start waiting cells while there are slots."""
        while self._waiting and len(self._book.running) - len(self._over) < self._executor.slots:
            if self._interrupt.asked:
                return
            cell = self._waiting.popleft()
            if self._book.start(cell, partial(self._progress.wait, cell)):
                self._progress.begin(cell)
                self._executor.submit(Job(cell.key, cell.config))
            else:
                self._elsewhere.append(cell)

    def _record(self, ended: Ended) -> None:
        """Record a cell that has ended."""
        cell = self._book.running[ended.key].cell
        with self._interrupt.held():
            said = self._book.finish(ended)
        if said is None:
            self._elsewhere.append(cell)
            self._progress.drop(cell, "another process took this one for dead and has the cell now")
        else:
            self._progress.end(cell, said, ended.result)

    def _wait(self) -> None:
        """Wait for a cell to end. If its process dies, requeue it; the second time, it has failed.

        After a Ctrl-C, it is killed and not requeued.
        """
        end = self._executor.wait(self._progress.step)
        if isinstance(end, Ended):
            self._over.append(end)
        elif self._interrupt.asked:
            self._progress.drop(self._book.cut_off(end.key, end.reason), end.reason)
        elif end.key in self._once_cut_off:
            self._over.append(Ended(end.key, error=f"{end.reason}, twice"))
        else:
            self._once_cut_off.add(end.key)
            cell = self._book.cut_off(end.key, end.reason)
            self._waiting.append(cell)
            self._progress.drop(cell, f"{end.reason}; retrying once")

    def _look_elsewhere(self) -> None:
        """Take over the cells that other processes gave up; if they still run all of them, wait."""
        cells, (busy, free) = self._elsewhere, self._book.of_others(self._elsewhere)
        for cell in cells:
            if cell not in busy and cell not in free:
                self._progress.end_elsewhere(cell)
        if busy and busy == cells:
            self._progress.wait(busy[0])
            time.sleep(POLL_SECONDS)
        self._elsewhere = busy
        self._waiting.extend(free)
