"""The output of the command line as JSON. Numbers are as recorded: fractions, seconds, bytes, not rounded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from basisadapt.core.ranges import Range
from basisadapt.study import statistics
from basisadapt.study.plan.space import Space
from basisadapt.study.plan.spec import StudySpec
from basisadapt.study.report.preview import Preview
from basisadapt.study.report.report import Report
from basisadapt.study.report.table import Across, Line, Table

Document = dict[str, Any]


def report_document(report: Report, tracking_uri: str) -> Document:
    """The report: rows, rows over all tasks, and verdicts.

    `at` has the rows at each value of the tuned setting, `trials` the trials of a search, best first.
    """
    table, spec = report.table, report.table.study.spec
    document = {
        **_heading(spec),
        "headline": table.headline,
        "reference": None if spec.reference is None else str(spec.reference),
        **_rows(table),
        "claims": [
            {"text": verdict.claim.text, "verdict": verdict.word, "because": list(verdict.because)}
            for verdict in report.verdicts
        ],
        "tracking_uri": tracking_uri,
    }
    if table.at:
        document["at"] = [{"value": value, **_rows(same)} for value, same in table.at.items()]
    if report.search is not None:
        document["trials"] = [asdict(trial) for trial in report.search.ranked]
    return document


def plan_document(preview: Preview, estimate: Document | None) -> Document:
    """The preview. estimate: the expected run time in seconds, or None.

    `steps` is null if `epochs` sets the length; `train_rows` and `eval_rows` are null if a cell uses all rows.
    """
    plans = preview.plans
    listed = [
        {
            "key": cell.key,
            "label": cell.row,
            "task": cell.config.task,
            "backbone": cell.config.backbone,
            "lr": cell.config.train.lr,
            "steps": cell.config.train.max_steps,
            "epochs": cell.config.train.epochs,
            "train_rows": cell.config.train.train_rows,
            "eval_rows": cell.config.train.eval_rows,
            "seed": cell.seed,
            "state": preview.states[cell.key],
            "modules": plans[cell.row].modules,
            "parameters": {
                name: getattr(plans[cell.row], name) for name in ("factors", "transfer", "head", "trainable", "total")
            },
        }
        for cell in preview.cells
    ]
    return {**_heading(preview.spec), "cells": listed, "downloads": list(preview.downloads), "estimate": estimate}


def space_document(spec: StudySpec, space: Space, trials: int, sampler: str) -> Document:
    """The plan of a search. space: setting to its range (low, high, log) or to its choices."""
    listed = {key: asdict(where) if isinstance(where, Range) else list(where) for key, where in space.items()}
    return {**_heading(spec), "trials": trials, "sampler": sampler, "space": listed}


def _heading(spec: StudySpec) -> Document:
    return {"study": spec.name, "title": spec.title}


def _rows(table: Table) -> Document:
    """The rows of a table, with plateaus if it has curves, and its rows over all tasks."""
    plateaus = [{"plateau": asdict(found) if (found := table.plateau(line)) else None} for line in table.lines]
    rows = zip(table.lines, plateaus if table.at else [{} for _ in plateaus], strict=True)
    return {
        "rows": [{**_row(line, table), **plateau} for line, plateau in rows],
        "over_tasks": [
            {"name": line.name, **_numbers(line), "pairs": asdict(line.pairs) if line.pairs else None}
            for line in table.across
        ],
    }


def _row(line: Line, table: Table) -> Document:
    first = line.row.cells[0]
    settings = first.settings
    return {
        "label": line.label,
        "task": line.task,
        "settings": {key: settings[key] for key in first.named if key in settings},
        **_numbers(line),
        "metrics": {name: line.mean_of(name) for name in table.columns},
        "states": line.seeds_by_state(),
        "runs": {str(seed): outcome.run_id for seed, outcome in line.outcomes.items()},
    }


def _numbers(line: Line | Across) -> Document:
    """The headline metric by seed or task with its statistics, and the published value as printed."""
    values = list(line.values.values())
    return {
        "values": {str(key): value for key, value in line.values.items()},
        "mean": statistics.mean(values),
        "std": statistics.std(values),
        "difference": asdict(line.difference) if line.difference else None,
        "p_holm": line.p,
        "published": dict(zip(("value", "std"), line.published, strict=True)) if line.published else None,
    }
