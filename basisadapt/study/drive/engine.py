"""The driver of a study: finds which cells are missing, hands them to an executor, records each, reports."""

from __future__ import annotations

import collections
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import format_exception
from types import TracebackType
from typing import TYPE_CHECKING

from basisadapt.command import tell
from basisadapt.diagnostics.figures import pictures
from basisadapt.errors import InputError, RecordError, one_line
from basisadapt.execution.executor import Ended, Executor, Job
from basisadapt.redaction import redacted
from basisadapt.study.drive.estimate import estimate_time
from basisadapt.study.drive.interrupt import Interrupt
from basisadapt.study.drive.progress import Progress, waiting_for
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.plan.tuning import Tuned, Tuning
from basisadapt.study.record.heartbeat import Heartbeat
from basisadapt.study.record.record import Imported, LostRunError, Record
from basisadapt.study.record.stores import (
    artifact_folder,
    check_database,
    is_stores_fault,
    record_error,
    same_database,
    sqlite_file,
    sqlite_url,
    storable,
    store_errors,
)
from basisadapt.study.record.trials import Trials
from basisadapt.study.report.files import KEPT, MARK, report_files
from basisadapt.study.report.report import Report, make_report
from basisadapt.study.report.table import tuned_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.training import Plan, RunResult

# Settings that no model, no task and no data depend on.
PACE = [f"train.{name}" for name in ("lr", "epochs", "max_steps", "schedule", "warmup_ratio", "weight_decay")]
POLL_SECONDS = 2.0  # between looks at a cell that another process runs


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a study's results and inputs lie.

    tracking_uri: MLflow's store. storage: Optuna's; None is `optuna.db` beside MLflow's file. data_dir: the
    tasks' data. output: a folder that also gets the report.
    """

    tracking_uri: str = "sqlite:///mlflow.db"
    storage: str | None = None
    data_dir: Path | None = None
    output: Path | None = None

    @property
    def optuna_url(self) -> str:
        """Optuna's storage."""
        if self.storage is not None:
            return self.storage
        beside = sqlite_file(self.tracking_uri)
        return sqlite_url("sqlite://", Path("optuna.db") if beside is None else beside.with_name("optuna.db"))


def run_study(tuning: Tuning, place: Place, tags: Mapping[str, str], executor: Executor) -> Report:
    """Run the cells that the record lacks, those that tune first, and report. `tags` go to the invocation's run.

    How long that may take is said first, on stderr, where the record knows.
    A cell that raises is recorded as failed and the others go on; one whose process dies is tried once more. Raises
    InputError before anything is recorded, KeyboardInterrupt once what it interrupts is recorded as killed, and
    RecordError where nothing can be recorded any more.
    """
    check_place(place)
    recorded = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    tuned = tuning.choose(recorded)
    for cells in (tuning.trials, tuned.planned.cells):
        _check_own_files(cells, recorded, place.data_dir)
        missing = missing_cells(cells, recorded)
        plan_cells(missing, place.data_dir)
        if missing:
            executor.prepare()
    if estimate := estimate_time(tuned.cells, tuned.seen(recorded), executor):
        tell(str(estimate))
    with Invocation(tuning.spec, tuning.possible_cells, place, tags, executor) as invocation:
        tuned = tuning.choose(invocation.run(tuning.trials))
        report = report_on(tuned, invocation.run(tuned.chosen.cells))
        invocation.end(report)
    return report


def check_place(place: Place) -> None:
    """Raise InputError unless results can be kept there."""
    if same_database(place.optuna_url, place.tracking_uri):
        raise InputError(f"--storage and --tracking-uri cannot share one database, {place.tracking_uri!r}")
    check_database(place.tracking_uri, "--tracking-uri")
    check_database(place.optuna_url, "--storage")
    folder = artifact_folder(place.tracking_uri)
    if folder is not None and folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{str(folder)!r}, where the files of runs go, cannot be written")


class Invocation:
    """One call of the command line: its parent run, closed whatever happens, and the cells run under it.

    cells: that the study may come to have. Inside, while cells run, the first Ctrl-C ends run() after them, see
    `Interrupt`.
    """

    def __init__(
        self, spec: StudySpec, cells: Iterable[Cell], place: Place, tags: Mapping[str, str], executor: Executor
    ) -> None:
        if place.output is not None:
            _make_folder(place.output)
        self._place, self._executor = place, executor
        self._interrupt = Interrupt()
        self._running: dict[str, _Running] = {}
        self._ended = False
        self._trials = Trials(place.optuna_url, spec.name, cells)
        self._record = Record(place.tracking_uri, spec.name, spec.metrics)
        try:
            self.run_id = self._record.begin(spec, tags)
            self._close_orphans()
        except store_errors() as error:
            raise InputError(f"--tracking-uri {place.tracking_uri!r}: {record_error(error)}") from error
        self._heartbeat = Heartbeat(self._record, self._at_work)

    def __enter__(self) -> Invocation:
        self._interrupt.__enter__()
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._interrupt.held():
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
        """What the record holds: cell key to outcome."""
        return self._record.outcomes()

    def running(self) -> set[str]:
        """The ids of the runs that are at work, here and elsewhere."""
        return self._record.close_orphans()

    def run(self, cells: Sequence[Cell]) -> dict[str, Outcome]:
        """Run what the record lacks of the cells. Returns what it then holds of them, at least."""
        outcomes = self._record.outcomes(cells)
        self._trials.follow(cells, outcomes)
        missing = missing_cells(cells, outcomes)
        total = len({cell.key for cell in cells})
        with Progress(total, total - len(missing)) as progress, self._interrupt.patient():
            self._run_cells(missing, progress)
        self._close_orphans()
        return self._record.outcomes(cells)

    def enter(self, results: Iterable[tuple[Imported, Mapping[str, bytes]]]) -> None:
        """Record what was run elsewhere, with its pictures, as if it had been here; what is at work stays as it is.

        Ctrl-C ends it after a result, whole.
        """
        cells = []
        for one, drawn in results:
            with self._interrupt.held():
                self._enter(one, drawn)
            cells.append(one.cell)
        self._trials.follow(cells, self.outcomes)

    def _enter(self, one: Imported, drawn: Mapping[str, bytes]) -> None:
        run_id = self._record.start(self.run_id, one.cell, lambda: tell(waiting_for(one.cell)), one)
        if run_id is None:
            return
        try:
            self._record.finish(run_id, one.cell, one.result, drawn, one)
        except Exception:
            with suppress(*store_errors()):
                self._record.close(run_id, "killed")
            raise

    def end(self, report: Report) -> None:
        """Keep the report, in the parent run and in the output folder."""
        files = report_files(report, self._record.pictures)
        # A long table may be cut off at MLflow's limit: the link comes first.
        compared = self._record.compare_path(report.table.run_ids)
        link = f"Compare its runs: `{compared}`\n\n" if compared else ""
        with self._interrupt.held():
            self._record.end(self.run_id, f"{link}{files['table.md']}", files)
            self._ended = True
        if self._place.output is not None:
            _write(files, self._place.output)

    def _run_cells(self, cells: Iterable[Cell], progress: Progress) -> None:
        """Keep the executor's slots full until no cell is left, and wait for those that other processes run."""
        waiting, elsewhere = collections.deque(cells), list[Cell]()
        running, over = self._running, list[Ended]()
        cut_off: set[str] = set()
        try:
            while waiting or running or elsewhere:
                # A slot is filled before the cell that left it is recorded, which takes a second.
                while waiting and len(running) - len(over) < self._executor.slots and not self._interrupt.asked:
                    cell = waiting.popleft()
                    started = self._start(cell, progress)
                    if started is None:
                        elsewhere.append(cell)
                        continue
                    running[cell.key] = started
                    progress.begin(cell)
                    self._executor.submit(Job(cell.key, cell.config))
                if over:
                    ended = over.pop()
                    at = running[ended.key]
                    with self._interrupt.held():
                        said = self._finish(at, ended)
                    if said is None:
                        elsewhere.append(at.cell)
                        progress.lost(at.cell)
                    else:
                        progress.end(at.cell, said)
                elif running:
                    end = self._executor.wait(progress.step)
                    if isinstance(end, Ended):
                        over.append(end)
                    elif end.key in cut_off:
                        over.append(Ended(end.key, error=f"{end.reason}, twice"))
                    else:
                        cut_off.add(end.key)
                        at = running.pop(end.key)
                        self._cut_off(at, end.reason)
                        waiting.append(at.cell)
                        progress.again(at.cell, end.reason)
                elif self._interrupt.asked:
                    raise KeyboardInterrupt
                else:
                    elsewhere, free = self._look_elsewhere(elsewhere, progress)
                    waiting.extend(free)
        except BaseException:
            with self._interrupt.held():
                self._executor.stop()
                # Where the stores are the reason, what is left open is closed by the next call.
                with suppress(*store_errors()):
                    for at in running.values():
                        self._cut_off(at, "")
            raise
        finally:
            running.clear()
        if self._interrupt.asked:
            raise KeyboardInterrupt

    def _at_work(self) -> list[str]:
        return [self.run_id, *(at.run_id for at in list(self._running.values()))]

    def _close_orphans(self) -> None:
        self._trials.close_orphans(self._record.close_orphans, self._record.outcomes)

    def _start(self, cell: Cell, progress: Progress) -> _Running | None:
        run_id = self._record.start(self.run_id, cell, lambda: progress.wait(cell))
        return None if run_id is None else _Running(cell, run_id, self._trials.ask(cell, run_id))

    def _finish(self, at: _Running, ended: Ended) -> str | None:
        """Record how a cell ended, which is then not at work any more. Returns that in words; None if it was lost."""
        status, value, said = self._record_end(at, ended)
        del self._running[at.cell.key]
        self._trials.tell(at.trial, status, value)
        return said

    def _record_end(self, at: _Running, ended: Ended) -> tuple[str, float | None, str | None]:
        """Write to MLflow how a cell ended. Returns its status, its value, and what `_finish` does."""
        result, error, traceback = ended.result, ended.error, ended.traceback
        if result is not None:
            try:
                self._record.finish(at.run_id, at.cell, result, draw(at.cell, result))
            except LostRunError:
                return "killed", None, None
            except Exception as reason:  # whatever a result is like, the other cells go on
                if is_stores_fault(reason):
                    raise
                error, traceback = one_line(reason), "".join(format_exception(reason))
            else:
                value = result.metrics[result.headline] if result.status == "finished" else None
                return result.status, value, result.status if value is None else f"{result.headline} {value:.4f}"
        self._record.fail(at.run_id, error, traceback)
        return "failed", None, f"failed: {error}"

    def _cut_off(self, at: _Running, reason: str) -> None:
        self._record.cut_off(at.run_id, reason)
        self._trials.tell(at.trial, "killed")

    def _look_elsewhere(self, cells: list[Cell], progress: Progress) -> tuple[list[Cell], list[Cell]]:
        """Of `cells`, those that others still run, after a while if that is all, and those that they left."""
        self._record.close_orphans()
        outcomes = self._record.outcomes()
        missing = missing_cells(cells, outcomes)
        for cell in cells:
            if cell not in missing:
                progress.end_elsewhere(cell)
        busy = [cell for cell in missing if cell.key in outcomes and outcomes[cell.key].busy]
        if busy and busy == cells:
            progress.wait(busy[0])
            time.sleep(POLL_SECONDS)
        return busy, [cell for cell in missing if cell not in busy]


@dataclass(frozen=True)
class _Running:
    """A cell at work, with its run in MLflow and its trial of Optuna."""

    cell: Cell
    run_id: str
    trial: int


def plan_cells(cells: Sequence[Cell], data_dir: Path | None, dry: bool = False) -> dict[str, Plan]:
    """Check every distinct configuration of `cells`, see `training.plan`. Returns row label to plan.

    Rows that differ in how long and how fast they learn alone share a plan, which takes a tenth of a second.
    """
    from basisadapt import training

    plans: dict[str, Plan] = {}
    alike: dict[str, Plan] = {}
    for cell in cells:
        if cell.row not in plans:
            shape = json.dumps({key: value for key, value in cell.settings.items() if key not in PACE}, sort_keys=True)
            if shape not in alike:
                alike[shape] = training.plan(cell.config, data_dir, dry)
            plans[cell.row] = alike[shape]
    return plans


def read_report(tuning: Tuning, place: Place) -> Report:
    """The report from the record alone. Raises InputError if nothing is recorded."""
    outcomes = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    if not outcomes:
        raise InputError(f"nothing of study {tuning.spec.name!r} is recorded in {place.tracking_uri!r}")
    report = report_on(tuning.choose(outcomes), outcomes)
    write_report(report, place)
    return report


def report_on(tuned: Tuned, outcomes: Mapping[str, Outcome]) -> Report:
    """The report on a study with what its tuning found, from the record."""
    return make_report(tuned_table(tuned, outcomes), tuned=tuned)


def write_report(report: Report, place: Place) -> None:
    """Write the report's files to the output folder, if there is one."""
    if place.output is not None:
        _make_folder(place.output)
        record = Record(place.tracking_uri, report.table.study.spec.name)
        _write(report_files(report, record.pictures), place.output)


def _check_own_files(cells: Iterable[Cell], outcomes: Mapping[str, Outcome], data_dir: Path | None) -> None:
    """Raise InputError if a file of the user's own has changed since some of the cells were run on it."""
    from basisadapt import tasks, training

    for cell in cells:
        seen = outcomes[cell.key].data.get("fingerprint") if cell.key in outcomes else None
        if seen is None or not any(tasks.stamp(cell.config.task, cell.config.data)):
            continue
        if training.load_data(cell.config, data_dir).fingerprint() != seen:
            raise InputError(
                f"the rows of {cell.config.task!r} have changed since {cell.row!r} was run on them; under another name "
                "they are run anew, and --report shows what is recorded of the old ones"
            )


def missing_cells(cells: Iterable[Cell], outcomes: Mapping[str, Outcome]) -> list[Cell]:
    """Those of the cells that are not done, each once."""
    once = {cell.key: cell for cell in cells}
    return [cell for key, cell in once.items() if key not in outcomes or not outcomes[key].done]


def draw(cell: Cell, result: RunResult) -> dict[str, bytes]:
    """The pictures of a result, name to PNG file."""
    return pictures(f"{cell.row}, seed {cell.seed}", asdict(result))


def _write(files: Mapping[str, str | Figure], output: Path) -> None:
    try:
        for name, content in files.items():
            if isinstance(content, str):
                (output / name).write_text(redacted(storable(content)), encoding="utf-8")
            else:
                content.savefig(output / name, dpi=150)
    except OSError as error:
        raise RecordError(f"--output {str(output)!r} cannot be written: {error.strerror}") from error


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {str(output)!r} cannot be made: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise InputError(f"--output {str(output)!r} cannot be written")
    others = [name for name in KEPT if (output / name).exists()]
    if others and not (output / MARK).exists():
        raise InputError(f"--output {str(output)!r} has a {others[0]} that no report has written; give another folder")
