"""The figures of a report."""

from __future__ import annotations

import pytest
from common import SOUND, add, no_pictures, outcome, outcomes, reported

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.report import figures, report
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


MAP = """
title: A map
question: Where?
base: {task: matrix/flat, backbone: minilm, train: {batch_size: 1}}
sweep: {method: [lora, phi, hira], task: [matrix/flat, matrix/power_1], r: [1, 4]}
beside: [{label: other, set: {method: dora}}]
reference: method=lora
seeds: [1, 2, 3]
map: {x: task, y: r}
"""


def test_a_study_may_be_drawn_over_two_axes(folder):
    """A panel for each method but the reference; differences in points, in brackets where they may be zero."""
    (folder / "map.yaml").write_text(MAP)
    study = resolve(read_spec("map.yaml"))

    def energy(cell):
        gain = {"phi": 0.1 if cell.config.task == "matrix/flat" else 0.001 * (cell.seed - 2)}.get(cell.config.method, 0)
        return 0.3 + 0.02 * cell.config.adapter.r * (gain != 0) + gain + 0.01 * cell.seed * (gain > 0.01)

    known = {cell.key: outcome(cell, energy(cell), headline="energy") for cell in study.cells}
    del known[next(cell.key for cell in study.cells if cell.row == "hira, matrix/flat, 1")]
    table = build_table(study, known)
    figure = figures.map_figure(table, "task", "r")
    phi, hira, _ = figure.axes
    assert (phi.get_title(), hira.get_title()) == ("phi", "hira")
    assert [label.get_text() for label in phi.get_xticklabels()] == ["matrix/flat", "matrix/power_1"]
    assert [label.get_text() for label in phi.get_yticklabels()] == ["1", "4"]
    drawn = {text.get_position(): text.get_text() for text in phi.texts}
    expected = {
        (line.task, line.row.point[-1][1]): line.difference.mean for line in table.lines if line.name[:3] == "phi"
    }
    places = {(("matrix/flat", "matrix/power_1").index(task), (1, 4).index(r)): x for (task, r), x in expected.items()}
    assert {place: float(text.strip("()")) for place, text in drawn.items()} == pytest.approx(
        {place: 100 * mean for place, mean in places.items()}, abs=0.006
    )
    assert not drawn[0, 0].startswith("("), "14 points, whatever the seed"
    assert {text.get_text() for text in hira.texts} == {"(+0.00)"}
    assert report_files(report.make_report(table), no_pictures)["map.png"].startswith(b"\x89PNG")
    assert "map.png" not in report_files(report.make_report(build_table(study, {})), no_pictures)


LINES = """
title: Lines
question: Along what?
base: {task: matrix/flat, backbone: minilm, train: {batch_size: 1}}
sweep: {method: [lora, phi], task: [matrix/flat, matrix/power_1], r: [1, 4]}
beside: [{label: other, set: {method: kradapter}}]
reference: method=lora
seeds: [1, 2, 3]
"""


def drawn_along(folder, rule, left_out=(), **metrics):
    """The figure of lines of a study in which energy grows with rank, more for phi, and with the seed."""
    (folder / "lines.yaml").write_text(LINES + rule)
    study = resolve(read_spec("lines.yaml"))
    known = {
        cell.key: outcome(
            cell,
            0.1 * (1 + (cell.config.method == "phi")) + 0.01 * cell.config.adapter.r + 0.001 * cell.seed,
            headline="energy",
            **{name: value(cell.config) for name, value in metrics.items()},
        )
        for cell in study.cells
        if cell.row not in left_out
    }
    table = build_table(study, known)
    return figures.lines_figure(table, study.spec.lines.along, study.spec.lines.against), table


def lines_in(axes):
    return {one.get_label(): dict(zip(*map(list, one.get_data()), strict=True)) for one in axes.get_lines()}


def test_lines_along_an_axis_have_its_values_as_places(folder):
    """A panel for each task, a line for each method, in percent; rows beside the axis have no place on it."""
    figure, table = drawn_along(folder, "lines: {along: r}\n", left_out=("phi, matrix/power_1, 4",))
    flat, power = figure.axes
    assert [flat.get_title(), power.get_title()] == ["matrix/flat", "matrix/power_1"]
    assert [label.get_text() for label in flat.get_xticklabels()] == ["1", "4"]
    assert lines_in(flat) == {
        "lora": {0: pytest.approx(11.2), 1: pytest.approx(14.2)},
        "phi": {0: pytest.approx(21.2), 1: pytest.approx(24.2)},
    }
    assert lines_in(power)["phi"] == {0: pytest.approx(21.2)}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lora", "phi"]
    assert figure.get_supxlabel() == "r"
    assert report_files(report.make_report(table), no_pictures)["lines.png"].startswith(b"\x89PNG")
    nothing = build_table(table.study, {})
    assert "lines.png" not in report_files(report.make_report(nothing), no_pictures)


def test_lines_against_a_metric_also_have_the_rows_beside_them(folder):
    figure, _ = drawn_along(
        folder,
        "lines: {along: r, against: parameters.trainable}\n",
        **{"parameters.trainable": lambda config: 100.0 * config.adapter.r + (config.method == "kradapter")},
    )
    for axes in figure.axes:
        lines = lines_in(axes)
        assert [list(lines[name]) for name in ("lora", "phi")] == [[100, 400]] * 2
        assert len(lines["other"]) == 1
        assert axes.get_xscale() == "log"
    assert figure.get_supxlabel() == "parameters.trainable"


def test_panels_are_named_by_what_their_rows_share(folder):
    figure, _ = drawn_along(folder, "lines: {along: task}\n")
    assert [axes.get_title() for axes in figure.axes] == ["r = 1", "r = 4", ""], "a row beside them has no r"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["matrix/flat", "matrix/power_1"]


def test_without_a_compared_axis_a_line_is_what_the_other_axes_say(folder):
    (folder / "lines.yaml").write_text(LINES.replace("reference: method=lora", "lines: {along: r}"))
    study = resolve(read_spec("lines.yaml"))
    table = build_table(study, {cell.key: outcome(cell, 0.5, headline="energy") for cell in study.cells})
    flat, _ = figures.lines_figure(table, "r", None).axes
    assert lines_in(flat).keys() == {"lora", "phi"}
