# PYTHON_ARGCOMPLETE_OK
"""The command line: `python -m basisadapt.study NAME`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from basisadapt.core.command import DONE, HAS_FAILURES, INTERRUPTED, aligned, complete, guarded, print_error, say
from basisadapt.core.errors import InputError, RecordError
from basisadapt.core.registry import load_plugin
from basisadapt.study.options import check_together, make_parser, seeds_of
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies
from basisadapt.training.execution.options import job_settings

if TYPE_CHECKING:
    from basisadapt.study.drive.paths import StudyPaths
    from basisadapt.study.drive.search import Search
    from basisadapt.study.plan.spec import StudySpec
    from basisadapt.study.plan.tuning import Tuning
    from basisadapt.study.report.report import Report
    from basisadapt.study.report.table import Table
    from basisadapt.training.execution.executor import Executor


class Answer(NamedTuple):
    """The output of a call.

    text: for a terminal.
    document: returns the same for --json.
    code: the exit code. Default DONE.
    then: slow work that nobody needs to wait for, done after the output. Default: nothing.
    """

    text: str
    document: Callable[[], Any]
    code: int = DONE
    then: Callable[[], None] = lambda: None


@guarded
def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    command = shlex.join(["python", "-m", "basisadapt.study", *arguments])
    try:
        parser = make_parser()
        complete(parser)
        options = parser.parse_args(arguments)
        check_together(options)
        if options.ui:
            from basisadapt.study.record.ui import serve

            serve(options.tracking_uri)
            return DONE
        # Output of plug-ins and libraries must not mix with the document.
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            answer = _run(options, command)
        say(json.dumps(answer.document(), indent=2, allow_nan=False) if options.json else answer.text)
        answer.then()
        return answer.code
    except InputError:
        if "--debug" in arguments:
            traceback.print_exc()
        raise
    except RecordError as error:
        print_error(f"{error}. The record is kept; to resume: {command}")
        return HAS_FAILURES
    except KeyboardInterrupt:
        print(f"\nInterrupted. Finished cells are kept; to resume: {command}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from basisadapt.study.record.stores import is_stores_fault, record_error

        if isinstance(error, OSError) or not is_stores_fault(error):
            raise
        print_error(f"{record_error(error)}. The record is kept; to resume: {command}")
        return HAS_FAILURES


def _run(options: argparse.Namespace, command: str) -> Answer:
    if options.list:
        return _studies()
    if options.merge is not None:
        return _merge(options)
    study_spec = read_spec(options.name or options.report)
    for plugin in options.plugin:
        load_plugin(plugin)

    from basisadapt.study.drive.adapters import place_for_adapters
    from basisadapt.study.drive.paths import StudyPaths
    from basisadapt.tasks.task import readable_folder

    if options.data_dir is not None:
        readable_folder(options.data_dir)

    place = StudyPaths(
        tracking_uri=options.tracking_uri,
        storage=options.storage,
        data_dir=options.data_dir,
        output=options.output,
        save_adapters=options.save_adapters,
    )
    with place_for_adapters(place.save_adapters) as adapters:
        return _answer(study_spec, place, _executor(options, adapters), options, command)


def _answer(
    study_spec: StudySpec, place: StudyPaths, executor: Executor, options: argparse.Namespace, command: str
) -> Answer:
    """Do what the options ask of a study."""
    from basisadapt.study.drive import engine

    tags = {"basisadapt.command": command, "basisadapt.preset": options.preset}
    if options.search is None:
        from basisadapt.study.plan.tuning import resolve_tuning

        seeds = seeds_of(options.seeds)
        tuning = resolve_tuning(study_spec, preset=options.preset, changes=options.set, seeds=seeds)
        if options.dry_run:
            return _plans(tuning, place, executor)
        if options.export is not None:
            return _export(tuning, place, options, command)
        if options.results is not None:
            return _import(tuning, place, tags, executor, options.results)
        if options.report:
            report = engine.read_report(tuning, place)
        else:
            report = engine.run_study(tuning, place, tags, executor)
    else:
        from basisadapt.study.drive.search import Search, read_search, run_search

        search = Search(
            spec=study_spec,
            preset=options.preset,
            changes=options.set,
            seeds=seeds_of(options.seeds),
            sampler=options.search,
            trials=options.trials,
            at_once=1 if options.at_once is None else options.at_once,
        )
        if options.dry_run:
            return _space(search)
        report = read_search(search, place) if options.report else run_search(search, place, tags, executor)
    return _report(report, place)


def _export(tuning: Tuning, place: StudyPaths, options: argparse.Namespace, command: str) -> Answer:
    from basisadapt.study.drive.exchange import export_cells

    path: Path = options.export
    count = export_cells(tuning, place, path)
    plugins = [word for plugin in options.plugin for word in ("--plugin", plugin)]
    elsewhere = ["python", "-m", "basisadapt.training", path.name, *plugins, "--output", "results.jsonl"]
    here = [*_without(shlex.split(command), "--export"), "--import", "results.jsonl"]
    lines = [
        f"{count} cells to run are in {path}. Elsewhere, and then here:",
        f"  {shlex.join(elsewhere)}",
        f"  {shlex.join(here)}",
    ]
    return Answer("\n".join(lines), lambda: {"study": tuning.spec.name, "file": str(path), "cells": count})


def _without(words: Sequence[str], option: str) -> list[str]:
    """A command without an option and its value. The option may be abbreviated."""
    for at, word in enumerate(words):
        name, separate, _ = word.partition("=")
        if len(name) > 2 and option.startswith(name):
            return [*words[:at], *words[at + (1 if separate else 2) :]]
    return [*words]


def _import(tuning: Tuning, place: StudyPaths, tags: dict[str, str], executor: Executor, paths: list[Path]) -> Answer:
    from basisadapt.study.drive.exchange import draw_pictures, import_results

    report, failed, run_ids = import_results(tuning, place, tags, executor, paths)
    for line in failed:
        print(f"not entered: {line.row}, seed {line.config['seed']}, which failed: {line.error}", file=sys.stderr)
    answer = _report(report, place)._replace(then=partial(draw_pictures, place, tuning.spec.name, run_ids))
    return answer._replace(code=HAS_FAILURES) if failed else answer


def _merge(options: argparse.Namespace) -> Answer:
    from basisadapt.study.drive.adapters import merge_run

    for plugin in options.plugin:
        load_plugin(plugin)
    needs = merge_run(options.merge, options.tracking_uri, options.output)
    said = f"{needs.config['method']} on {needs.backbone}, merged, is in {options.output}: transformers loads it"
    return Answer(said, lambda: {"model": str(options.output), "config": needs.config})


def _executor(options: argparse.Namespace, adapters: Path | None) -> Executor:
    from basisadapt.training.execution.ray_executor import RayExecutor, RaySettings
    from basisadapt.training.execution.workers import local_executor

    settings = job_settings(options, adapters)
    if options.ray is None:
        return local_executor(options.workers, settings)
    needs = {"cpus": options.cpus_per_cell, "gpus": options.gpus_per_cell}
    given = {name: value for name, value in needs.items() if value is not None}
    return RayExecutor(RaySettings(address=options.ray, **given), settings)


def _studies() -> Answer:
    titles = {name: read_spec(name).title for name in list_studies()}
    lines = aligned(list(titles.items()), left=(0, 1))
    return Answer("\n".join(lines), lambda: [{"study": name, "title": title} for name, title in titles.items()])


def _space(search: Search) -> Answer:
    from basisadapt.study.report.documents import space_document

    lines = [f"{search.spec.title}: a search of {search.trials} trials over", ""]
    space = search.space()
    lines += [f"{key}: {where}" for key, where in space.items()]
    return Answer("\n".join(lines), lambda: space_document(search.spec, space, search.trials, search.sampler))


def _plans(tuning: Tuning, place: StudyPaths, executor: Executor) -> Answer:
    from basisadapt.study.drive import engine
    from basisadapt.study.drive.estimate import estimate_time
    from basisadapt.study.record.record import Record
    from basisadapt.study.report.documents import plan_document
    from basisadapt.study.report.preview import Preview, to_preview

    outcomes = Record.read(place.tracking_uri, tuning.spec.name, tuning.spec.metrics)
    tuned = tuning.choose(outcomes)
    cells, outcomes = tuned.cells, tuned.seen(outcomes)
    plans = engine.plan_cells(cells, place.data_dir, dry=True)
    states = {cell.key: outcomes[cell.key].status if cell.key in outcomes else "to run" for cell in cells}
    with executor:  # whose slots may be those of a cluster
        estimate = estimate_time(cells, outcomes, executor)
    if estimate is not None:
        print(estimate, file=sys.stderr)
    expected = asdict(estimate) if estimate else None
    downloads = engine.downloads(cells, outcomes, place.data_dir)
    preview = Preview(tuning.spec, cells, plans, states, downloads)
    return Answer(to_preview(preview), lambda: plan_document(preview, expected))


def _report(report: Report, place: StudyPaths) -> Answer:
    from basisadapt.study.record.record import Record
    from basisadapt.study.report.documents import report_document
    from basisadapt.study.report.text import to_text

    table = report.table
    lines = [to_text(report), f"Recorded in {place.tracking_uri}; to browse:"]
    if place.tracking_uri.startswith(("http:", "https:")):
        server = place.tracking_uri.rstrip("/")
    else:
        server = "http://127.0.0.1:5000"
        lines.append(f"  mlflow ui --backend-store-uri {shlex.quote(place.tracking_uri)}")
    record = Record(place.tracking_uri, table.study.spec.name)
    lines.append(f"  {server}/#/experiments/{record.experiment_id}/runs  all runs, by invocation")
    if compared := record.compare_path(table.run_ids):
        lines.append(f"  {server}{compared}  the cells above, compared")
    if place.save_adapters:
        lines += _adapters(table, place.tracking_uri)
    if place.output is not None:
        lines.append(f"Written to {place.output}")
    document = partial(report_document, report, place.tracking_uri)
    return Answer("\n".join(lines), document, HAS_FAILURES if report.has_failures else DONE)


def _adapters(table: Table, tracking_uri: str) -> list[str]:
    """The runs of the table whose adapters are kept, and how one is merged."""
    from basisadapt.study.record.adapters import with_adapters

    kept = with_adapters(tracking_uri, table.run_ids)
    if not kept:
        return ["No adapter is kept with these runs: a cell that is on record is not run again for it"]
    cells = {outcome.run_id: (line, seed) for line in table.lines for seed, outcome in line.outcomes.items()}
    return [
        "Adapters are kept with these runs; to merge one: python -m basisadapt.study --merge RUN --output DIR",
        *(f"  {run_id}  {line.label}, seed {seed}" for run_id in kept for line, seed in [cells[run_id]]),
    ]


if __name__ == "__main__":
    sys.exit(main())
