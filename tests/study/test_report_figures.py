"""The figures of a report."""

from __future__ import annotations

import pytest
from common import SOUND, add, no_pictures, outcome, outcomes, reported

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.spec import read_spec
from basisadapt.study.report import figures
from basisadapt.study.report.files import report_files
from basisadapt.study.report.table import build_table


def test_figures(two_bases, tmp_path):
    known = {**outcomes(two_bases, SOUND), two_bases.cells[0].key: outcome(two_bases.cells[0])}
    figures.comparison_figure(build_table(two_bases, known)).savefig(tmp_path / "comparison.png")
    figures.comparison_figure(build_table(two_bases, {})).savefig(tmp_path / "nothing.png")


def test_the_comparison_has_a_panel_for_each_task(folder):
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("sweep: {", "sweep: {task: [docstrings, glue/cola], "))
    study = resolve(read_spec("tiny.yaml"))
    known = {cell.key: outcome(cell, 0.5) for cell in study.cells if cell.row != "glue/cola, sinc"}
    left, right = figures.comparison_figure(build_table(study, known)).axes
    assert (left.get_title(), right.get_title()) == ("docstrings", "glue/cola")
    assert [label.get_text() for label in left.get_yticklabels()] == ["sinc", "fourier", "LoRA"]
    dots = [{y for line in axes.lines for y in line.get_ydata() if line.get_marker() == "o"} for axes in (left, right)]
    assert dots == [{0, 1, 2}, {1, 2}]


def test_a_study_may_be_drawn_against_what_rows_cost(folder):
    add(folder, "against: [parameters.trainable, seconds.train]\n")
    found = reported(resolve(read_spec("tiny.yaml")), SOUND, **{"seconds.train": 3.0})
    assert report_files(found, no_pictures)["against.png"].startswith(b"\x89PNG")
    figure = figures.against_figure(found.table)
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters.trainable", "seconds.train"]
    assert [{text.get_text() for text in axes.texts} for axes in figure.axes] == [{"sinc", "fourier", "LoRA"}] * 2
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("against: ", "columns: "))
    assert "against.png" not in report_files(reported(resolve(read_spec("tiny.yaml")), SOUND), no_pictures)


def test_over_several_tasks_it_is_drawn_against_the_means_of_those_that_have_all(folder):
    path = folder / "tiny.yaml"
    text = path.read_text().replace("sweep: {", "sweep: {task: [docstrings, glue/cola], ")
    path.write_text(text + "against: [parameters.trainable]\n")
    study = resolve(read_spec("tiny.yaml"))
    scores = {"docstrings, sinc": 0.5, "glue/cola, sinc": 0.7, "LoRA, docstrings": 0.4, "LoRA, glue/cola": 0.5}
    there = [cell for cell in study.cells if cell.row != "glue/cola, fourier"]
    known = {cell.key: outcome(cell, scores.get(cell.row, 0.6)) for cell in there}
    (axes,) = figures.against_figure(build_table(study, known)).axes
    assert axes.get_ylabel().endswith("(mean over 2 tasks)")
    assert {text.get_text() for text in axes.texts} == {"LoRA", "sinc"}
    assert sorted(drawn.lines[0].get_ydata().item() for drawn in axes.containers) == pytest.approx([45.0, 60.0])
