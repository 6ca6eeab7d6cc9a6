"""One call of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from basisadapt.core.command import tell
from basisadapt.core.errors import InputError
from basisadapt.study.drive.book import Book, missing_cells
from basisadapt.study.drive.callback import Callback, Callbacks
from basisadapt.study.drive.interrupt import Interrupt
from basisadapt.study.drive.loop import Loop
from basisadapt.study.drive.paths import StudyPaths, make_folder, write_files
from basisadapt.study.drive.progress import Progress, Standing, waiting_for
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell, Row, parameter_values
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.record.client import few_retries
from basisadapt.study.record.heartbeat import Heartbeat
from basisadapt.study.record.record import Imported, Record
from basisadapt.study.record.stores import record_error, store_errors
from basisadapt.study.record.trials import Trials
from basisadapt.study.report.files import report_files
from basisadapt.study.report.report import Report
from basisadapt.study.report.text import to_markdown
from basisadapt.training.execution.executor import Executor


class Invocation:
    """One call of the command line: its parent run, which is always closed, and the cells that run under it.

    spec: the study.
    cells: the cells that the study may run.
    place: where results and inputs are.
    tags: tags of the parent run.
    executor: where cells run.
    callbacks: called as each cell ends. Default none.

    While cells run, the first Ctrl-C ends run() after them, see `Interrupt`. Raises InputError if the stores cannot be
    opened.
    """

    def __init__(
        self,
        spec: StudySpec,
        cells: Iterable[Cell],
        place: StudyPaths,
        tags: Mapping[str, str],
        executor: Executor,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if place.output is not None:
            make_folder(place.output)
        self._spec, self._place, self._executor = spec, place, executor
        self._interrupt = Interrupt(executor.finish)
        self._ended = False
        self._trials = Trials(place.optuna_url, spec.name, parameter_values(spec, cells))
        self._record = Record(place.tracking_uri, spec.name, spec.metrics)
        try:
            self.run_id = self._record.begin(spec, tags)
            self._book = Book(self._record, self._trials, self.run_id, Callbacks(callbacks), executor.adapters)
            self._book.close_orphans()
        except store_errors() as error:
            raise InputError(f"--tracking-uri {place.tracking_uri!r}: {record_error(error)}") from error
        self._heartbeat = Heartbeat(self._record, lambda: self._book.run_ids)

    def __enter__(self) -> Invocation:
        self._interrupt.__enter__()
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._interrupt.held(), few_retries():
                self._heartbeat.stop()
                self._executor.stop()
                if error is not None and not self._ended:
                    with suppress(*store_errors()):
                        self._record.close(self.run_id, "killed" if isinstance(error, KeyboardInterrupt) else "failed")
        finally:
            self._interrupt.__exit__(kind, error, at)
        if isinstance(error, store_errors()):
            raise record_error(error) from error

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """The recorded outcomes, cell key to outcome."""
        return self._record.outcomes()

    def running(self) -> set[str]:
        """The ids of the open runs, of this process and others. Closes those of dead processes."""
        return self._record.close_orphans()

    def run(self, cells: Sequence[Cell], rows: Sequence[Row] = ()) -> dict[str, Outcome]:
        """Run the missing cells in their order. Returns the outcomes of all given cells, at least.

        rows: the rows whose difference to their reference is printed as their cells end.
        """
        outcomes = self._record.outcomes(cells)
        self._trials.follow(cells, outcomes)
        missing = missing_cells(cells, outcomes)
        total = len({cell.key for cell in cells})
        standing = Standing(self._spec, rows, outcomes)
        with (
            Progress(missing, total - len(missing), self._executor.slots, standing) as progress,
            self._interrupt.patient(),
        ):
            Loop(missing, self._book, self._executor, self._interrupt, progress).run()
        self._book.close_orphans()
        return self._record.outcomes(cells)

    def enter(self, results: Sequence[Imported]) -> None:
        """Record what was run elsewhere as if it had been here, without pictures; what is at work stays as it is.

        Ctrl-C ends it after a result, whole.
        """
        for one in results:
            with self._interrupt.held():
                self._enter(one)
        self._trials.follow([one.cell for one in results], self.outcomes)

    def _enter(self, one: Imported) -> None:
        run_id = self._record.start(self.run_id, one.cell, lambda: tell(waiting_for(one.cell)), one)
        if run_id is None:
            return
        try:
            self._record.finish(run_id, one.cell, one.result, {}, one)
        except Exception:
            with suppress(*store_errors()):
                self._record.close(run_id, "killed")
            raise

    def end(self, report: Report) -> None:
        """Write the report to the parent run and to the output folder."""
        files = report_files(report, self._record.pictures.of)
        # MLflow truncates a long note, so the link comes first.
        compared = self._record.compare_path(report.table.run_ids)
        link = f"Compare its runs: `{compared}`\n\n" if compared else ""
        with self._interrupt.held():
            self._record.end(self.run_id, f"{link}{to_markdown(report)}", files)
            self._ended = True
        if self._place.output is not None:
            write_files(files, self._place.output)
