"""Export of a study's missing cells to a file for `python -m basisadapt.training`, and import of its results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from basisadapt.core.command import tell
from basisadapt.core.errors import InputError, refusing
from basisadapt.diagnostics.drawable import check_drawable
from basisadapt.study.drive.book import missing_cells
from basisadapt.study.drive.engine import report_on
from basisadapt.study.drive.invocation import Invocation
from basisadapt.study.drive.paths import StudyPaths, check_paths
from basisadapt.study.plan.cells import Cell, cell_key
from basisadapt.study.plan.tuning import Tuning
from basisadapt.study.record.record import Imported, Record
from basisadapt.study.report.report import Report
from basisadapt.training.config import RunConfig
from basisadapt.training.execution.executor import Executor
from basisadapt.training.execution.json_lines import (
    CellLine,
    ResultLine,
    check_replaceable,
    parse_result,
    read_lines,
    to_line,
)


def export_cells(tuning: Tuning, place: StudyPaths, path: Path) -> int:
    """Write the missing cells to a file, one per line. Returns their number; records nothing.

    For a row that is not tuned yet, these are its trials. Raises InputError if the file cannot be written, or holds
    something else.
    """
    outcomes = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    cells = missing_cells([*tuning.trials, *tuning.choose(outcomes).chosen.cells], outcomes)
    lines = [CellLine(study=cell.study, row=cell.row, key=cell.key, config=cell.config.to_mapping()) for cell in cells]
    check_replaceable(path, "--export")
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text("".join(map(to_line, lines)), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"--export {str(path)!r} cannot be written: {error.strerror}") from error
    return len(cells)


def import_results(
    tuning: Tuning, place: StudyPaths, tags: Mapping[str, str], executor: Executor, paths: Sequence[Path]
) -> tuple[Report, list[ResultLine], list[str]]:
    """Record the results of `python -m basisadapt.training`, and report; runs nothing.

    tags: tags of the invocation's MLflow run.
    paths: files of results; they may hold other studies too.

    A cell that is done in the record stays as it is. A result of another study counts for a cell of the same
    configuration, and is skipped otherwise. Results of this study with other options are skipped and counted on stderr.
    Returns the report; the lines of failed cells, which are not recorded and still to be run; and the runs of the
    others, whose pictures `draw_pictures` draws. Raises InputError before anything is recorded: if the files have lines
    of this study but of no cell with these options, if the configuration of a line does not match its key, or if a
    result cannot be plotted.
    """
    check_paths(place)
    cells = {cell.key: cell for cell in tuning.possible_cells}
    results: dict[str, Imported] = {}
    failed: dict[str, ResultLine] = {}
    elsewhere: list[InputError] = []
    for path, number, line in _numbered(paths):
        with refusing(f"{path}, line {number}", InputError):
            cell = _cell_of(line, cells, tuning.spec.name)
            if cell is None:
                if line.study == tuning.spec.name:
                    problem = f"cell {line.key} ({line.row}) is not a cell of this study with these options"
                    elsewhere.append(InputError(f"{path}, line {number}: {problem}"))
            elif line.result is None:
                failed[cell.key] = line
            else:
                results[cell.key] = Imported(cell, parse_result(line.result), line.host, line.began, line.ended)
    if elsewhere and not results and not failed:
        raise elsewhere[0]
    if elsewhere:
        own = len(elsewhere) + len(results) + len(failed)
        tell(f"{len(elsewhere)} of {own} results are of this study with other options, and are passed over")
    recorded = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    new = [one for key, one in results.items() if key not in recorded or not recorded[key].done]
    for one in new:
        with refusing(f"the result of cell {one.cell.key} cannot be drawn", ValueError):
            check_drawable(vars(one.result))
    with Invocation(tuning.spec, cells.values(), place, tags, executor) as invocation:
        invocation.enter(new)
        outcomes = invocation.outcomes
        report = report_on(tuning.choose(outcomes), outcomes)
        invocation.end(report)
    done = {key for key, outcome in outcomes.items() if outcome.done}
    return (
        report,
        [line for key, line in failed.items() if key not in done],
        [outcomes[key].run_id for key in results if key in done],
    )


def draw_pictures(place: StudyPaths, study: str, run_ids: Sequence[str]) -> None:
    """Draw the pictures of those runs that have none. An interrupted call is resumed by the next."""
    pictures = Record(place.tracking_uri, study).pictures
    undrawn = pictures.undrawn(run_ids)
    if undrawn:
        tell(f"drawing the pictures of {len(undrawn)} cells; Ctrl-C leaves them to the next --import")
    for run_id in undrawn:
        pictures.of(run_id)


def _numbered(paths: Sequence[Path]) -> Iterator[tuple[Path, int, ResultLine]]:
    for path in paths:
        for number, line in enumerate(read_lines(path, ResultLine, "--import"), start=1):
            yield path, number, line


def _cell_of(line: ResultLine, cells: Mapping[str, Cell], study: str) -> Cell | None:
    """The cell of a line; None if the study has no such cell. Raises InputError if its configuration was changed.

    The key of a line is that of its configuration as written. Newer settings are at their defaults.
    """
    here = Cell(study, line.row, RunConfig.from_mapping(line.config))
    key = cell_key(line.study, line.config)
    if key != line.key:
        raise InputError(f"its study and configuration have the key {key}, not {line.key}: they were changed")
    return cells.get(here.key)
