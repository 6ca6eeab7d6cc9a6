"""A study of many rows: what its report takes grows as they do, its page and its figures do not."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest
from matplotlib.figure import Figure

from basisadapt.study.drive import engine
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.study.record import record as writing
from basisadapt.study.record import runs as reading
from basisadapt.study.record.record import Record
from basisadapt.study.report import figures, text, text_tables
from basisadapt.study.report.documents import report_document
from basisadapt.study.report.html import MAX_PICTURED, to_html
from basisadapt.study.report.report import make_report
from basisadapt.study.report.table import build_table

STUDY = """
title: Many rows
question: How many are too many?
base: {{task: docstrings, backbone: minilm, method: phi, adapter: {{r: 4}}}}
sweep: {{basis: [sinc, fourier], train.lr: {rates}}}
reference: basis=sinc
seeds: [1, 2]
claims: [{{text: The first is better, better: "fourier, 0.001", than: "sinc, 0.001"}}]
"""
PICTURE = b"\x89PNG" + bytes(100_000)


@pytest.fixture
def many(folder):
    """A study of so many rows; the later ones have the greater scores."""

    def make(rows):
        rates = [round(0.001 * (1 + number / 1000), 6) for number in range(rows // 2)]
        (folder / "many.yaml").write_text(STUDY.format(rates=rates))
        return resolve(read_spec("many.yaml"))

    return make


def reported(study):
    """The report on a study with scores that grow row by row."""
    outcomes = {
        cell.key: Outcome(f"run {n}", cell.key, "finished", "accuracy", {"accuracy": 0.5 + n / 1e5}, (), "", n)
        for n, cell in enumerate(study.cells)
    }
    return make_report(build_table(study, outcomes))


def test_the_page_has_the_pictures_of_the_rows_that_matter(many):
    asked = []

    def pictures(run_id):
        asked.append(run_id)
        return {"phi.png": PICTURE}

    pages = {rows: to_html(reported(many(rows)), {}, pictures) for rows in (MAX_PICTURED, 400)}
    assert len(asked) == 2 * MAX_PICTURED
    assert [page.count("<img ") for page in pages.values()] == [MAX_PICTURED] * 2
    assert "rows: those that claims name" not in pages[MAX_PICTURED]
    assert f"Of {MAX_PICTURED} of 400 rows" in pages[400]
    assert "The pictures of every cell are with its run in MLflow." in pages[400]
    assert len(pages[400]) < len(pages[MAX_PICTURED]) + 400 * 1000
    shown = re.findall(r"<summary>(\w+, [\d.]+), seed 1</summary>", pages[400])
    assert {"sinc, 0.001", "fourier, 0.001"} <= {*shown}  # which the claim names
    best = [f"fourier, {0.001 * (1 + number / 1000):g}" for number in range(199, 191, -1)]
    assert {*best} <= {*shown}
    assert {name.replace("fourier", "sinc") for name in best} <= {*shown}  # with which they are compared


@pytest.mark.parametrize("rows", [MAX_PICTURED, 400])
def test_large_pictures_are_of_fewer_rows(many, rows):
    page = to_html(reported(many(rows)), {}, lambda _: {"phi.png": 10 * PICTURE})
    assert page.count("<img ") == 3
    assert f"Of 3 of {rows} rows" in page
    assert len(page) < 6e6


def test_a_figure_has_the_rows_that_matter_and_says_so(many):
    few, all_of_them = (reported(many(rows)).table for rows in (400, figures.MAX_ROWS))
    drawn = figures.comparison_figure(few)
    assert drawn.get_suptitle() == f"Many rows ({figures.MAX_ROWS} of 400 rows)"
    names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert len(names) == figures.MAX_ROWS
    assert "fourier, 0.001199" in names
    assert drawn.get_figheight() < 50
    assert figures.comparison_figure(all_of_them).get_suptitle() == "Many rows"


def steps_of(function, *arguments):
    """How many functions a call makes, and what it returns."""
    count = 0

    def call(frame, event, _):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(call)
    try:
        found = function(*arguments)
    finally:
        sys.setprofile(None)
    return count, found


def everything(study):
    report = reported(study)
    for words in (text.to_text, text.to_markdown, lambda report: text.to_csv(report.table)):
        words(report)
    report_document(report, "here")
    to_html(report, {}, lambda _: {})


def test_what_a_report_takes_grows_as_its_rows_do(many):
    few, more = (steps_of(everything, many(rows))[0] for rows in (200, 400))
    assert more < 2.2 * few
    assert more - few < 200 * 1500


def test_what_a_plan_takes_grows_as_its_rows_do(many):
    many(200)
    few, _ = steps_of(resolve_tuning, read_spec("many.yaml"))
    many(400)
    more, _ = steps_of(resolve_tuning, read_spec("many.yaml"))
    assert more < 2.2 * few
    assert more - few < 200 * 1500


def test_a_report_is_laid_out_and_drawn_once(home, drawn_reports, study, monkeypatch):
    made = []

    def counted(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *values, **named: made.append(name) or function(*values, **named))

    counted(text_tables, "_main")
    counted(Figure, "savefig")
    assert study("tiny.yaml", "--output", "report")[0] == 0
    assert sorted(made) == ["_main", "savefig"]


def test_rows_that_differ_in_their_pace_alone_are_planned_once(many, fake, monkeypatch):
    planned, plan = [], fake.plan

    def once(config, *arguments):
        planned.append(config.adapter.basis)
        return plan(config, *arguments)

    monkeypatch.setattr("basisadapt.training.planning.plan", once)
    many(40)
    cells = resolve_tuning(read_spec("many.yaml")).possible_cells
    assert len(engine.plan_cells(cells, None, dry=True)) == 40
    assert planned == ["sinc", "fourier"]


def test_numbers_are_written_at_once_as_mlflow_writes_them(home, fake, monkeypatch):
    record, spec = Record("sqlite:///mlflow.db", "tiny"), read_spec("tiny.yaml")
    parent, (first, second, *_) = record.begin(spec, {}), resolve(spec).cells
    result = fake.run(first.config, on_step=lambda *_: None)
    curves = {"loss": [(1, 2.0), (3, 1.0), (3, 1.5), (2, 4.0), (1, 2.0), (4, float("nan"))]}
    result = dataclasses.replace(result, curves=curves)
    run_ids = [record.start(parent, cell) for cell in (first, second)]
    record.finish(run_ids[0], first, result, {})
    monkeypatch.setattr(writing, "has_tables", lambda _: False)
    record.finish(run_ids[1], second, result, {})
    at_once, by_mlflow = (record._client.get_run(run_id).data.metrics for run_id in run_ids)
    assert at_once == by_mlflow
    assert (at_once["loss"], len(at_once)) == (1.5, 14)
    histories = [
        {(point.step, point.value) for point in record._client.get_metric_history(run_id, "loss")} for run_id in run_ids
    ]
    assert histories == [{(1, 2.0), (2, 4.0), (3, 1.0), (3, 1.5)}] * 2


def test_the_record_is_read_at_once_as_mlflow_reads_it(home, fake, study, monkeypatch):
    fake.ways = {("sinc", 2): "raise", ("fourier", 1): "diverge"}
    assert study("tiny.yaml", "--seeds", "1,2")[0] == 1
    record = Record("sqlite:///mlflow.db", "tiny")
    with monkeypatch.context() as from_here:
        from_here.setattr(reading.Owner, "me", lambda: reading.Owner.of(1))
        cell = resolve(read_spec("tiny.yaml"), seeds=[9]).cells[0]
        record.start(record.begin(read_spec("tiny.yaml"), {}), cell)
    named = "stable_rank/encoder.layer.0.output.dense"
    at_once = Record("sqlite:///mlflow.db", "tiny", ["curve/accuracy", named]).outcomes()
    monkeypatch.setattr(reading, "has_tables", lambda _: False)
    by_mlflow = record.outcomes()
    assert len(at_once) == 7
    for key, outcome in by_mlflow.items():
        told = {name: v for name, v in outcome.metrics.items() if "/" not in name or name in ("curve/accuracy", named)}
        found = at_once[key]
        assert (found.metrics, found.run_id, found.status) == (told, outcome.run_id, outcome.status)
        assert {**vars(found), "metrics": {}} == {**vars(outcome), "metrics": {}}
    finished = [outcome for outcome in at_once.values() if outcome.status == "finished"]
    assert {outcome.metrics[named] for outcome in finished} == {1.2}
    assert json.dumps([*finished[0].environment]) == '["git_commit", "torch"]'
    assert finished[0].environment is finished[1].environment
