"""The driver of a study: finds which cells are missing, runs them one by one, records each, reports."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from basisadapt.diagnostics.figures import figures
from basisadapt.errors import InputError
from basisadapt.study.cells import Cell, Study
from basisadapt.study.files import report_files
from basisadapt.study.progress import Progress
from basisadapt.study.record import Outcome, Record, check_database, one_line, sqlite_file
from basisadapt.study.report import Report, make_report
from basisadapt.study.spec import StudySpec
from basisadapt.study.table import build_table
from basisadapt.study.trials import Trials
from basisadapt.study.tuning import Tuned, Tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.training import Plan

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
        beside = sqlite_file(self.tracking_uri)
        return self.storage or f"sqlite:///{beside.with_name('optuna.db') if beside else 'optuna.db'}"


def run_study(tuning: Tuning, place: Place, tags: Mapping[str, str]) -> Report:
    """Run the cells that the record lacks, those that tune first, and report. `tags` go to the invocation's run.

    A cell that raises is recorded as failed and the others go on. Raises InputError before anything is
    recorded, and KeyboardInterrupt once the interrupted cell is recorded as killed.
    """
    check_place(place)
    recorded = Record.read(place.tracking_uri, tuning.spec.name)
    for study in (tuning.trials, tuning.choose(recorded).study):
        _check_own_files(study, recorded, place.data_dir)
        plan_cells(_missing(study, recorded), place.data_dir)
    with Invocation(tuning.spec, place, tags) as invocation:
        tuned = tuning.choose(invocation.run(tuning.trials))
        report = _report(tuned, invocation.run(tuned.chosen))
        invocation.end(report)
    return report


def check_place(place: Place) -> None:
    """Raise InputError unless results can be kept there."""
    if place.optuna_url == place.tracking_uri:
        raise InputError(f"--storage and --tracking-uri cannot share one database, {place.tracking_uri!r}")
    check_database(place.tracking_uri, "--tracking-uri")
    check_database(place.optuna_url, "--storage")


class Invocation:
    """One call of the command line: its parent run, closed whatever happens, and the cells run under it."""

    def __init__(self, spec: StudySpec, place: Place, tags: Mapping[str, str]) -> None:
        if place.output is not None:
            _make_folder(place.output)
        self._place = place
        self._trials = Trials(place.optuna_url, spec.name)
        self._record = Record(place.tracking_uri, spec.name)
        self._parent = self._record.begin(spec, tags)

    def __enter__(self) -> Invocation:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._record.close(self._parent, "killed" if isinstance(error, KeyboardInterrupt) else "failed")

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """What the record holds: cell key to outcome."""
        return self._record.outcomes()

    def run(self, study: Study) -> dict[str, Outcome]:
        """Run what the record lacks of the study's cells. Returns what it then holds."""
        outcomes = self.outcomes
        if not study.rows:
            return outcomes
        self._trials.follow(study.cells, outcomes)
        total = len({cell.key for cell in study.cells})
        done = total - len({cell.key for cell in _missing(study, outcomes)})
        with Progress(total, done) as progress:
            tried: set[str] = set()
            while cell := _next_cell(study, self._record, tried, progress):
                run_id = self._record.start(self._parent, cell)
                if run_id is not None:
                    tried.add(cell.key)
                    _run_cell(cell, self._record, run_id, self._trials, self._place.data_dir, progress)
        return self.outcomes

    def end(self, report: Report) -> None:
        """Keep the report, in the parent run and in the output folder."""
        files = report_files(report, self._record.pictures)
        # A long table may be cut off at MLflow's limit: the link comes first.
        note = f"Compare its runs: `{self._record.compare_path(report.table.run_ids)}`\n\n{files['table.md']}"
        self._record.end(self._parent, note, files)
        if self._place.output is not None:
            _write(files, self._place.output)


def plan_cells(cells: Sequence[Cell], data_dir: Path | None, dry: bool = False) -> dict[str, Plan]:
    """Check every distinct configuration of `cells`, see `training.plan`. Returns row label to plan."""
    from basisadapt import training

    plans: dict[str, Plan] = {}
    for cell in cells:
        if cell.row not in plans:
            plans[cell.row] = training.plan(cell.config, data_dir, dry)
    return plans


def read_report(tuning: Tuning, place: Place) -> Report:
    """The report from the record alone. Raises InputError if nothing is recorded."""
    outcomes = Record.read(place.tracking_uri, tuning.spec.name)
    if not outcomes:
        raise InputError(f"nothing of study {tuning.spec.name!r} is recorded in {place.tracking_uri!r}")
    report = _report(tuning.choose(outcomes), outcomes)
    write_report(report, place)
    return report


def _report(tuned: Tuned, outcomes: Mapping[str, Outcome]) -> Report:
    return make_report(build_table(tuned.study, tuned.seen(outcomes)), tuned=tuned)


def write_report(report: Report, place: Place) -> None:
    """Write the report's files to the output folder, if there is one."""
    if place.output is not None:
        _make_folder(place.output)
        record = Record(place.tracking_uri, report.table.study.spec.name)
        _write(report_files(report, record.pictures), place.output)


def _check_own_files(study: Study, outcomes: Mapping[str, Outcome], data_dir: Path | None) -> None:
    """Raise InputError if a file of the user's own has changed since cells of the study were run on it."""
    from basisadapt import tasks, training

    for cell in study.cells:
        seen = outcomes[cell.key].data.get("fingerprint") if cell.key in outcomes else None
        if seen is None or not any(tasks.stamp(cell.config.task, cell.config.data)):
            continue
        if training.load_data(cell.config, data_dir).fingerprint() != seen:
            raise InputError(
                f"the rows of {cell.config.task!r} have changed since {cell.row!r} was run on them; under another name "
                "they are run anew, and --report shows what is recorded of the old ones"
            )


def _missing(study: Study, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    return [cell for cell in study.cells if cell.key not in outcomes or not outcomes[cell.key].done]


def _next_cell(study: Study, record: Record, tried: set[str], progress: Progress) -> Cell | None:
    """A cell that is not done, tried or run by another process; waits while there are only the last."""
    while True:
        outcomes = record.outcomes()
        missing = [cell for cell in _missing(study, outcomes) if cell.key not in tried]
        free = [cell for cell in missing if cell.key not in outcomes or not outcomes[cell.key].busy]
        if free or not missing:
            return free[0] if free else None
        progress.wait(missing[0])
        time.sleep(POLL_SECONDS)
        record.close_orphans()


def _run_cell(
    cell: Cell, record: Record, run_id: str, trials: Trials, data_dir: Path | None, progress: Progress
) -> None:
    from basisadapt import training

    progress.begin(cell)
    trial = trials.ask(cell)
    try:
        result = training.run(cell.config, data_dir=data_dir, on_step=progress.step)
        record.finish(run_id, cell, result, figures(f"{cell.row}, seed {cell.seed}", asdict(result)))
    except KeyboardInterrupt:
        record.close(run_id, "killed")
        trials.tell(trial, "killed")
        raise
    except Exception as error:  # whatever a run raises, the other cells go on
        record.fail(run_id, error)
        trials.tell(trial, "failed")
        progress.end(cell, f"failed: {one_line(error)}")
    else:
        value = result.metrics[result.headline] if result.status == "finished" else None
        trials.tell(trial, result.status, value)
        progress.end(cell, result.status if value is None else f"{result.headline} {value:.4f}")


def _write(files: Mapping[str, str | Figure], output: Path) -> None:
    for name, content in files.items():
        if isinstance(content, str):
            (output / name).write_text(content, encoding="utf-8")
        else:
            content.savefig(output / name, dpi=150)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {str(output)!r} cannot be made: {error.strerror}") from error
