"""The driver of a study: finds which cells are missing, runs them one by one, records each, reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from basisadapt.diagnostics.figures import figures
from basisadapt.errors import InputError
from basisadapt.study import report
from basisadapt.study.record import Outcome, Record, check_database, one_line, sqlite_file
from basisadapt.study.spec import Cell, Study
from basisadapt.study.trials import Trials

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from basisadapt.training import Plan

POLL_SECONDS = 2.0  # between looks at a cell that another process runs


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a study's results and inputs lie.

    tracking_uri: MLflow's store. storage: Optuna's; None is `optuna.db` beside MLflow's file. data_dir: the
    tasks' data. output: a folder that also gets the table and its figure.
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


def run_study(study: Study, place: Place, tags: Mapping[str, str]) -> report.Table:
    """Run the cells that the record lacks, and report. `tags` go to the invocation's run.

    A cell that raises is recorded as failed and the others go on. Raises InputError before anything is
    recorded, and KeyboardInterrupt once the interrupted cell is recorded as killed.
    """
    if place.optuna_url == place.tracking_uri:
        raise InputError(f"--storage and --tracking-uri cannot share one database, {place.tracking_uri!r}")
    check_database(place.tracking_uri, "--tracking-uri")
    check_database(place.optuna_url, "--storage")
    plan_cells(_missing(study, Record.read(place.tracking_uri, study.spec.name)), place.data_dir)
    if place.output is not None:
        _make_folder(place.output)

    trials = Trials(place.optuna_url, study.spec.name)
    record = Record(place.tracking_uri, study.spec.name)
    parent = record.begin(study.spec, tags)
    with _closing(record, parent):
        trials.follow(study.cells, record.outcomes())
        with _Progress(study, record.outcomes()) as progress:
            tried: set[str] = set()
            while cell := _next_cell(study, record, tried, progress):
                run_id = record.start(parent, cell)
                if run_id is not None:
                    tried.add(cell.key)
                    _run_cell(cell, record, run_id, trials, place.data_dir, progress)
        table = report.build_table(study, record.outcomes())
        files = report.files(table)
        record.end(parent, f"{files['table.md']}\nCompare its runs: `{record.compare_path(table.run_ids)}`", files)
    if place.output is not None:
        _write(files, place.output)
    return table


def plan_cells(cells: Sequence[Cell], data_dir: Path | None) -> dict[str, Plan]:
    """Check every distinct configuration of `cells` against model and data. Returns row label to plan."""
    from basisadapt import training

    plans: dict[str, Plan] = {}
    for cell in cells:
        if cell.row not in plans:
            plans[cell.row] = training.plan(cell.config, data_dir)
    return plans


def read_report(study: Study, place: Place) -> report.Table:
    """The table from the record alone. Raises InputError if nothing is recorded."""
    outcomes = Record.read(place.tracking_uri, study.spec.name)
    if not outcomes:
        raise InputError(f"nothing of study {study.spec.name!r} is recorded in {place.tracking_uri!r}")
    table = report.build_table(study, outcomes)
    if place.output is not None:
        _make_folder(place.output)
        _write(report.files(table), place.output)
    return table


def _missing(study: Study, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    return [cell for cell in study.cells if cell.key not in outcomes or not outcomes[cell.key].done]


def _next_cell(study: Study, record: Record, tried: set[str], progress: _Progress) -> Cell | None:
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
    cell: Cell, record: Record, run_id: str, trials: Trials, data_dir: Path | None, progress: _Progress
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


@contextmanager
def _closing(record: Record, parent: str) -> Iterator[None]:
    """Close the invocation's run if it does not come to its end."""
    try:
        yield
    except BaseException as error:
        record.close(parent, "killed" if isinstance(error, KeyboardInterrupt) else "failed")
        raise


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


class _Progress:
    """A bar over the cells where stderr is a terminal, a line per cell where it is not."""

    def __init__(self, study: Study, outcomes: Mapping[str, Outcome]) -> None:
        total = len({cell.key for cell in study.cells})
        done = total - len({cell.key for cell in _missing(study, outcomes)})
        self._bar = tqdm(total=total, initial=done, unit="cell", file=sys.stderr, disable=not sys.stderr.isatty())
        self._count, self._total, self._began = done, total, 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, cell: Cell) -> None:
        self._began = time.monotonic()
        self._bar.set_description_str(f"{cell.row}, seed {cell.seed}")

    def wait(self, cell: Cell) -> None:
        text = f"waiting for another process to finish {cell.row}, seed {cell.seed}"
        if self._bar.disable and text != self._bar.desc:
            print(text, file=sys.stderr, flush=True)
        self._bar.set_description_str(text)

    def step(self, step: int, total: int) -> None:
        self._bar.set_postfix_str(f"step {step}/{total}")

    def end(self, cell: Cell, shown: str) -> None:
        self._count += 1
        self._bar.update()
        if self._bar.disable:
            seconds = time.monotonic() - self._began
            line = f"[{self._count}/{self._total}] {cell.row}, seed {cell.seed}: {shown} ({seconds:.0f} s)"
            print(line, file=sys.stderr, flush=True)
