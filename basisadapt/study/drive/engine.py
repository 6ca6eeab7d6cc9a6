"""The driver of a study: finds the missing cells, has them run, and reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from basisadapt import backbones, tasks, training
from basisadapt.core.command import tell
from basisadapt.core.errors import InputError
from basisadapt.study.drive.book import missing_cells
from basisadapt.study.drive.callback import Callback
from basisadapt.study.drive.estimate import estimate_time
from basisadapt.study.drive.invocation import Invocation
from basisadapt.study.drive.paths import StudyPaths, check_paths, make_folder, write_files
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.plan.tuning import Tuned, Tuning
from basisadapt.study.record.record import Record
from basisadapt.study.report.files import report_files
from basisadapt.study.report.report import Report, make_report
from basisadapt.study.report.table import tuned_table
from basisadapt.tasks import DataSettings, hub
from basisadapt.training.execution.executor import Executor

if TYPE_CHECKING:
    from basisadapt.training import Plan
    from basisadapt.training.config import RunConfig

# Settings on which neither model nor data depend: configurations that differ in these alone share a plan.
PACE = [f"train.{name}" for name in ("lr", "epochs", "max_steps", "schedule", "warmup_ratio", "weight_decay")]


def run_study(
    tuning: Tuning, place: StudyPaths, tags: Mapping[str, str], executor: Executor, callbacks: Sequence[Callback] = ()
) -> Report:
    """Run the missing cells, trials first, and report.

    tags: tags of the invocation's MLflow run.
    callbacks: called as each cell ends.

    Prints an estimate of the run time on stderr if the record allows one. A cell that raises is recorded as failed, and
    the others run. A cell whose process dies is retried once. Raises InputError before anything is recorded,
    KeyboardInterrupt after recording the interrupted cells as killed, and RecordError if a store fails.
    """
    check_paths(place)
    recorded = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    tuned = tuning.choose(recorded)
    for cells in (tuning.trials, tuned.planned.cells):
        _check_own_files(cells, recorded, place.data_dir)
        make_ready(missing_cells(cells, recorded), place.data_dir, executor)
    if estimate := estimate_time(tuned.cells, tuned.seen(recorded), executor):
        tell(str(estimate))
    with Invocation(tuning.spec, tuning.possible_cells, place, tags, executor, callbacks) as invocation:
        tuned = tuning.choose(invocation.run(tuning.trials))
        compared = [choice.row for choice in tuned.choices if choice.best]
        report = report_on(tuned, invocation.run(tuned.chosen.in_turn, compared))
        invocation.end(report)
    return report


def make_ready(cells: Sequence[Cell], data_dir: Path | None, executor: Executor) -> None:
    """Check the configurations, inputs and memory that `cells` need. Raises InputError."""
    plans = plan_cells(cells, data_dir)
    if plans:
        executor.prepare(max(plan.total for plan in plans.values()))
        if executor.here:
            _check_hub(cells, data_dir)


def plan_cells(cells: Sequence[Cell], data_dir: Path | None, dry: bool = False) -> dict[str, Plan]:
    """Check each distinct configuration of `cells`, see `training.plan`. Returns row label to plan.

    Rows that differ in PACE alone share a plan, since each takes a tenth of a second.
    """
    plans: dict[str, Plan] = {}
    alike: dict[str, Plan] = {}
    for cell in cells:
        if cell.row not in plans:
            shape = json.dumps({key: value for key, value in cell.settings.items() if key not in PACE}, sort_keys=True)
            if shape not in alike:
                alike[shape] = training.plan(cell.config, data_dir, dry)
            plans[cell.row] = alike[shape]
    return plans


def downloads(cells: Iterable[Cell], outcomes: Mapping[str, Outcome], data_dir: Path | None) -> list[str]:
    """What the missing cells would download from the hub, in words. Makes no request."""
    wanted: dict[str, None] = {}
    for name, task, data in _inputs(missing_cells(cells, outcomes)):
        if source := backbones.missing_weights(backbones.find(name)):
            wanted[f"backbone {source}"] = None
        sources = tasks.find(task, data).sources(data_dir)
        wanted |= dict.fromkeys(f"data {source}" for source in sources if not hub.is_cached(source))
    return list(wanted)


def _check_hub(cells: Iterable[Cell], data_dir: Path | None) -> None:
    """Load missing data from the hub, and check that it has the missing weights.

    Raises InputError if it has not, or cannot be reached.
    """
    inputs = _inputs(cells)
    for name in dict.fromkeys(name for name, _, _ in inputs):
        backbones.check_reachable(backbones.find(name))
    for (_, task, data), config in inputs.items():
        if not all(map(hub.is_cached, tasks.find(task, data).sources(data_dir))):
            training.load_data(config, data_dir)


def _inputs(cells: Iterable[Cell]) -> dict[tuple[str, str, DataSettings], RunConfig]:
    """The inputs of cells, (backbone, task, data settings), each to a configuration with them."""
    return {(cell.config.backbone, cell.config.task, cell.config.data): cell.config for cell in cells}


def read_report(tuning: Tuning, place: StudyPaths) -> Report:
    """The report from the record; runs nothing. Raises InputError if nothing is recorded."""
    outcomes = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    if not outcomes:
        raise InputError(f"nothing of study {tuning.spec.name!r} is recorded in {place.tracking_uri!r}")
    report = report_on(tuning.choose(outcomes), outcomes)
    write_report(report, place)
    return report


def report_on(tuned: Tuned, outcomes: Mapping[str, Outcome]) -> Report:
    """The report on a tuned study. outcomes: cell key to outcome."""
    return make_report(tuned_table(tuned, outcomes), tuned=tuned)


def write_report(report: Report, place: StudyPaths) -> None:
    """Write the report's files to `place.output`, unless that is None."""
    if place.output is not None:
        make_folder(place.output)
        record = Record(place.tracking_uri, report.table.study.spec.name)
        write_files(report_files(report, record.pictures.of), place.output)


def _check_own_files(cells: Iterable[Cell], outcomes: Mapping[str, Outcome], data_dir: Path | None) -> None:
    """Raise InputError if a user's own data file has changed since a cell ran on it."""
    for cell in cells:
        seen = outcomes[cell.key].data.get("fingerprint") if cell.key in outcomes else None
        if seen is None or not any(tasks.stamp(cell.config.task, cell.config.data)):
            continue
        if training.load_data(cell.config, data_dir).fingerprint() != seen:
            raise InputError(
                f"the rows of {cell.config.task!r} have changed since {cell.row!r} was run on them; under another name "
                "they are run anew, and --report shows what is recorded of the old ones"
            )
