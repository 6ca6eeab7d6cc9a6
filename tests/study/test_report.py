from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from basisadapt.core.errors import InputError
from basisadapt.diagnostics.diagnostic import DIAGNOSTICS, Diagnostic
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.spec import published_values, read_spec
from basisadapt.study.record.notes import cell_note
from basisadapt.study.report import figures, report, text
from basisadapt.study.report.files import report_files
from basisadapt.study.report.footnotes import problems
from basisadapt.study.report.table import build_table
from basisadapt.study.report.text_tables import text_tables
from basisadapt.training import RunResult


@pytest.fixture
def two_bases(folder):
    return resolve(read_spec("tiny.yaml"))


def outcome(cell, value=None, status="finished", warnings=(), error="", headline="accuracy", **metrics):
    metrics = {"stable_rank.mean": 1.5, "dc_share.mean": 0.25, "parameters.trainable": 4321.0, **metrics}
    if value is not None:
        metrics[headline] = value
    environment = {"git_commit": "abc123", "torch": "2.13.0"}
    return Outcome(
        f"run-{cell.key}", cell.key, status, headline, metrics, tuple(warnings), error, environment=environment
    )


def outcomes(study, values, **options):
    return {cell.key: outcome(cell, value, **options) for cell, value in zip(study.cells, values, strict=True)}


def reported(study, values, **options):
    return report.make_report(build_table(study, outcomes(study, values, **options)))


def no_pictures(run_id):
    return {}


SOUND = [0.80, 0.85, 0.79, 0.70, 0.71, 0.75, 0.75, 0.84, 0.77]


TEXT = """\
Two bases

row       accuracy, %   published  seeds  difference to LoRA (95 % CI)  p (Holm)  stable rank  DC share  trainable
-------  ------------  ----------  -----  ----------------------------  --------  -----------  --------  ---------
sinc     81.33 ± 3.21  61.1 ± 0.2      3          +2.67 [-2.50, +7.84]     0.313         1.50     0.250      4,321
fourier  72.00 ± 2.65  59.2 ± 0.5      3         -6.67 [-20.79, +7.46]     0.313         1.50     0.250      4,321
LoRA     78.67 ± 4.73           -      3                             -         -         1.50     0.250      4,321

Mean ± sample standard deviation over 3 seeds (1, 2, 3).
Differences to LoRA are paired by seed: mean, 95 % confidence interval (t), two-sided paired t-test, Holm-corrected \
for 2 tests.
A difference of 14.13 could have been seen in the middle row, 5.17 to 14.13 in all: half the width of its interval.
Published: the paper's table 13 (Qwen2). On another backbone and task, only the order of the rows can be compared.
"""


def test_text(two_bases):
    assert text.to_text(reported(two_bases, SOUND)) == TEXT


def test_markdown_has_as_many_columns_in_every_row(two_bases):
    lines = text.to_markdown(reported(two_bases, SOUND)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10}
    assert len(rows) == 5


def test_csv_holds_the_numbers(two_bases):
    printed = text.to_csv(build_table(two_bases, outcomes(two_bases, SOUND)))
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert float(rows[0]["mean"]) == pytest.approx(2.44 / 3)
    assert float(rows[0]["difference"]) == pytest.approx(0.08 / 3)
    half = 4.302653 * float(rows[0]["std"]) / 3**0.5  # t(0.975, 2)
    assert float(rows[0]["mean_ci_low"]) == pytest.approx(2.44 / 3 - half)
    assert (rows[0]["n"], rows[0]["states"], rows[0]["published"]) == ("3", "finished: 1 2 3", "61.1")
    assert rows[2]["p_holm"] == ""


def test_one_seed_has_no_deviation_and_no_test(folder):
    study = resolve(read_spec("tiny.yaml"), seeds=[1])
    printed = text.to_text(reported(study, [0.5, 0.6, 0.55]))
    assert "One seed a row (1): no deviation, interval or test." in printed
    sinc = next(line for line in printed.splitlines() if line.startswith("sinc"))
    assert sinc.split() == ["sinc", "50.00", "61.1", "±", "0.2", "1", "-5.00", "-", "1.50", "0.250", "4,321"]


def test_a_metric_that_is_no_fraction_is_not_scaled(two_bases):
    found = reported(two_bases, [4.2] * 9, headline="score")
    assert not found.table.percent
    assert "4.2000 ± 0.0000" in text.to_text(found)


def test_a_study_may_name_further_columns(folder):
    path = folder / "tiny.yaml"
    path.write_text(path.read_text() + "columns: [active_n.mean, parameters.transfer, no.such]\n")
    study = resolve(read_spec("tiny.yaml"))
    found = reported(study, SOUND, **{"active_n.mean": 24.125, "parameters.transfer": 3600.0})
    line = next(line for line in text.to_text(found).splitlines() if line.startswith("fourier"))
    assert line.split()[-4:] == ["4,321", "24.1", "3,600", "-"]
    assert "active n |" in text.to_markdown(found)
    row = next(csv.DictReader(io.StringIO(text.to_csv(found.table))))
    assert (row["active_n.mean"], row["no.such"]) == ("24.125", "")
    assert ">active n<" in report_files(found, no_pictures)["report.html"]


def test_a_diagnostic_is_a_column_of_every_table(two_bases, monkeypatch):
    monkeypatch.setattr(DIAGNOSTICS, "_classes", {})

    class RelativeSize(Diagnostic, name="relative_size"):
        def number(self, change, layer):
            raise AssertionError("a report measures nothing")

    found = reported(two_bases, SOUND, **{"relative_size.mean": 0.125})
    assert "relative size |" in text.to_markdown(found)
    row = next(csv.DictReader(io.StringIO(text.to_csv(found.table))))
    assert row["relative_size.mean"] == "0.125"
    assert "relative size |" in text.to_markdown(reported(two_bases, SOUND)), "also before its cells are run again"


def test_how_linear_phi_is_stands_beside_a_row_once_a_run_has_it(two_bases):
    """Cells that were recorded before print what they printed, to the last byte."""
    cells = two_bases.cells
    known = outcomes(two_bases, SOUND)
    for cell, share in zip(cells[:6], (0.004, 0.002, 0.006, 0.004, 0.02, 0.004), strict=True):
        linear = {"linear_fit.mean": 1.65, "linear_fit.largest": 2.0, "nonlinear_share.mean": 0.001}
        known[cell.key] = outcome(cell, 0.8, **linear, **{"nonlinear_share.largest": share})
    found = report.make_report(build_table(two_bases, known))
    printed = text.to_text(found)
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert rows["row"].endswith("trainable  linear fit c  nonlinear share  largest share")
    assert rows["sinc"].split()[-3:] == ["1.65", "0.10%", "0.40%"]
    assert rows["LoRA"].split()[-3:] == ["-", "-", "-"]
    sentence = "φ is LoRA with its scale times c where no module's share reaches 1 %: sinc (times 1.65)."
    assert sentence in printed.splitlines(), "not fourier, of which one seed has 2 %"
    assert "nonlinear share" in report_files(found, no_pictures)["report.html"]
    assert next(csv.DictReader(io.StringIO(text.to_csv(found.table))))["nonlinear_share.largest"] == "0.004"


def test_a_run_says_on_its_page_that_phi_is_lora(two_bases):
    metrics = {"accuracy": 0.5, "linear_fit.mean": 1.654, "nonlinear_share.mean": 0.001}
    for largest, said in ((0.009, True), (0.01, False)):
        result = RunResult("finished", "accuracy", {**metrics, "nonlinear_share.largest": largest})
        note = cell_note(two_bases.cells[0], result)
        assert "- nonlinear_share.mean: 0.001\n" in note
        assert ("This φ is LoRA with its scale times 1.65" in note) is said


def test_a_column_may_be_a_quotient_of_two_metrics(folder):
    """Cell by cell, so that its mean is that of the quotients; without a divisor there is none."""
    path = folder / "tiny.yaml"
    path.write_text(path.read_text() + "columns: [bits / parameters.trainable, bits / zero]\n")
    study = resolve(read_spec("tiny.yaml"))
    cells = study.cells[:3]
    known = {
        cell.key: outcome(cell, 0.5, bits=bits, zero=0.0, **{"parameters.trainable": numbers})
        for cell, bits, numbers in zip(cells, (100.0, 300.0, 50.0), (1000.0, 1500.0, 100.0), strict=True)
    }
    found = report.make_report(build_table(study, known))
    assert found.table.lines[0].mean_of("bits / parameters.trainable") == pytest.approx((0.1 + 0.2 + 0.5) / 3)
    line = next(line for line in text.to_text(found).splitlines() if line.startswith("sinc"))
    assert line.split()[-2:] == ["0.267", "-"]
    assert "| bits a number |" in text.to_markdown(found)


def test_mixed_states(two_bases):
    known = outcomes(two_bases, SOUND)
    cells = two_bases.cells
    known[cells[0].key] = outcome(cells[0], status="failed", error="RuntimeError: out of memory")
    known[cells[1].key] = outcome(cells[1], status="diverged")
    known[cells[3].key] = outcome(cells[3], status="killed")
    del known[cells[4].key]
    for cell in cells[6:8]:
        known[cell.key] = outcome(cell, 0.5, warnings=["collapsed"])
    found = report.make_report(build_table(two_bases, known))
    assert found.has_failures
    page = report_files(found, no_pictures)["report.html"]
    for printed in (text.to_text(found), page):
        assert "1 of 3 failed, 1 of 3 diverged" in printed
        assert "1 of 3 killed, 1 of 3 not run" in printed
        assert "Failed: sinc seed 1 (RuntimeError: out of memory)." in printed
        assert "Diverged: sinc seed 2." in printed
        assert "Warning, LoRA seeds 1, 2: collapsed" in printed
    assert "Cells: 1 failed, 1 diverged, 5 finished, 1 killed, 1 not run." in page
    nothing = report.make_report(build_table(two_bases, {}))
    assert not nothing.has_failures
    assert "3 of 3 not run" in text.to_text(nothing)
    assert "No cell has recorded them." in report_files(nothing, no_pictures)["report.html"]


def test_costs_have_units(folder):
    path = folder / "tiny.yaml"
    path.write_text(path.read_text() + "columns: [memory.peak_bytes, adapter.bytes, tokens_per_second]\n")
    costs = {"memory.peak_bytes": 1.5e9, "adapter.bytes": 688_992.0, "tokens_per_second": 1234.5}
    found = reported(resolve(read_spec("tiny.yaml")), SOUND, **costs)
    (header,) = (line for line in text.to_markdown(found).splitlines() if line.startswith("| row"))
    assert header.endswith("| peak memory, MB | adapter, MB | tokens/s |")
    line = next(line for line in text.to_text(found).splitlines() if line.startswith("fourier"))
    assert line.split()[-3:] == ["1,500", "0.69", "1,234"]
    assert float(next(csv.DictReader(io.StringIO(text.to_csv(found.table))))["adapter.bytes"]) == 688_992, "as recorded"


TASKS = """
title: Two tasks
question: Do they agree?
base: {task: docstrings, backbone: minilm, method: phi, adapter: {r: 4}}
sweep: {basis: [sinc], task: [glue/cola, glue/rte, glue/mrpc]}
beside:
  - {label: LoRA, set: {method: lora}}
reference: LoRA
seeds: [1, 2]
"""


def test_rows_are_compared_within_their_task_and_over_all_tasks(folder):
    (folder / "tasks.yaml").write_text(TASKS)
    study = resolve(read_spec("tasks.yaml"))
    assert [row.label for row in study.rows][2:4] == ["sinc, glue/mrpc", "LoRA, glue/cola"]
    assert [row.task for row in study.rows][3:] == ["glue/cola", "glue/rte", "glue/mrpc"]
    # Differences by task: 0.1 and 0.3, 0.2 and 0.4, 0.3 and 0.5; their means 0.2, 0.3, 0.4.
    values = [0.5, 0.7, 0.6, 0.8, 0.7, 0.9, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    table = build_table(study, outcomes(study, values))
    assert table.lines[1].difference.mean == pytest.approx(0.3)
    sinc, lora = table.across
    assert (sinc.name, sinc.difference.n) == ("sinc", 3)
    # Mean 0.3, std 0.1, so t = 0.3 √3 / 0.1 with 2 degrees of freedom: p = 1 − t / √(t² + 2).
    t = 3 * 3**0.5
    assert sinc.difference.p == pytest.approx(1 - t / (t * t + 2) ** 0.5)
    assert lora.difference is lora.pairs is None
    # The six differences: mean 0.3, std √0.02, so 0.3 ± t(5) std / √6, with t(5) = 2.5706.
    assert (sinc.pairs.n, sinc.pairs.mean) == (6, pytest.approx(0.3))
    half = 2.5706 * (0.02 / 6) ** 0.5
    assert (sinc.pairs.low, sinc.pairs.high) == pytest.approx((0.3 - half, 0.3 + half), rel=1e-4)
    printed = text.to_text(report.make_report(table))
    line = [line for line in printed.splitlines() if line.startswith("sinc ")][-1]
    assert line.split()[:4] == ["sinc", "70.00", "3", "+30.00"]
    assert line.endswith("+30.00 [+15.16, +44.84]")
    # Of two of three tasks there is a difference, and no mean to stand beside the others.
    known = {
        key: found for key, found in outcomes(study, values).items() if key not in {c.key for c in study.cells[:2]}
    }
    printed = text.to_text(report.make_report(build_table(study, known)))
    line = [line for line in printed.splitlines() if line.startswith("sinc ")][-1]
    assert line.split()[:5] == ["sinc", "-", "2", "of", "3"]


def test_a_published_table_without_tasks_stands_beside_the_means_over_tasks():
    study = resolve(read_spec("ablate_basis"), changes=["sweep.task=glue/cola,glue/rte", "sweep.basis=sinc"])
    assert [row.label for row in study.rows] == [
        f"{name}, {task}"
        for name in ("sinc", "LoRA", "paper sinc", "linear", "sine")
        for task in ("glue/cola", "glue/rte")
    ]
    table = build_table(study, outcomes(study, [0.5] * len(study.cells)))
    assert {line.published for line in table.lines} == {None}
    sinc, lora, paper, *controls = table.across
    assert {line.published for line in (lora, *controls)} == {None}
    assert sinc.published == paper.published == published_values(study.spec.answers)["basis=sinc",]
    rows, across = text_tables(report.make_report(table))[:2]
    assert "published" not in rows.header
    assert across.rows[0][2].startswith(sinc.published[0])


def test_an_axis_value_as_reference_pairs_rows_that_are_otherwise_equal(folder):
    source = (
        (folder / "tiny.yaml")
        .read_text()
        .replace("sweep: {basis: [sinc, fourier]}", "sweep: {method: [phi, lora], r: [4, 8]}")
    )
    source = source.replace("reference: LoRA", "reference: method=lora").replace(
        "  - {label: LoRA, set: {method: lora}}", "  - {label: paper, set: {adapter.preset: paper, r: 8}}"
    )
    (folder / "tiny.yaml").write_text(source)
    study = resolve(read_spec("tiny.yaml"))
    values = {"phi, 4": 0.7, "phi, 8": 0.9, "lora, 4": 0.5, "lora, 8": 0.6, "paper": 0.3}
    found = {cell.key: outcome(cell, values[cell.row]) for cell in study.cells}
    table = build_table(study, found)
    gains = {line.label: line.difference and pytest.approx(line.difference.mean) for line in table.lines}
    assert gains == {"phi, 4": 0.2, "phi, 8": 0.3, "lora, 4": None, "lora, 8": None, "paper": -0.3}
    assert "the row with method=lora that is otherwise equal" in text.to_text(report.make_report(table))


def test_an_axis_value_that_is_not_there_is_refused_as_reference(folder):
    text = (folder / "tiny.yaml").read_text().replace("reference: LoRA", "reference: basis=gaussian_rbf")
    (folder / "tiny.yaml").write_text(text)
    with pytest.raises(InputError, match="reference row 'basis=gaussian_rbf'"):
        resolve(read_spec("tiny.yaml"))


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
    path = folder / "tiny.yaml"
    path.write_text(path.read_text() + "against: [parameters.trainable, seconds.train]\n")
    found = reported(resolve(read_spec("tiny.yaml")), SOUND, **{"seconds.train": 3.0})
    assert report_files(found, no_pictures)["against.png"].startswith(b"\x89PNG")
    figure = figures.against_figure(found.table)
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters.trainable", "seconds.train"]
    assert [{text.get_text() for text in axes.texts} for axes in figure.axes] == [{"sinc", "fourier", "LoRA"}] * 2
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


def test_data_that_changed_between_cells_and_splits_are_said(two_bases):
    found = outcomes(two_bases, SOUND)
    for number, cell in enumerate(two_bases.cells):
        data = {"fingerprint": "new" if number == 4 else "old", "split": "one row in five is held out"}
        found[cell.key] = dataclasses.replace(found[cell.key], data=data)
    made = report.make_report(build_table(two_bases, found))
    printed = text.to_text(made)
    changed = (
        "The rows of docstrings changed between cells, which cannot be compared across the change: "
        "sinc seeds 1, 2, 3, fourier seeds 1, 3, LoRA seeds 1, 2, 3 saw old; fourier seed 2 saw new."
    )
    assert f"\n{changed}\n" in printed
    assert "\nRows of docstrings: one row in five is held out.\n" in printed
    assert problems(made.table) == [changed]
    same = {key: dataclasses.replace(outcome, data={"fingerprint": "old"}) for key, outcome in found.items()}
    assert text.to_text(report.make_report(build_table(two_bases, same))) == TEXT


# --- folders and files of others ---


def test_a_file_that_no_report_has_written_is_not_overwritten(home, fake, study):
    (home / "mine").mkdir()
    (home / "mine" / "table.csv").write_text("precious")
    code, out, err = study("tiny.yaml", "--seeds", "1", "--output", "mine")
    assert (code, out, err.count("\n"), fake.ran) == (2, "", 1, [])
    assert "--output 'mine' has a table.csv that no report has written; give another folder" in err
    assert [(path.name, path.read_text()) for path in (home / "mine").iterdir()] == [("table.csv", "precious")]
    for _ in range(2):  # its own folder, and one with other files
        (home / "mine" / "table.csv").unlink(missing_ok=True)
        assert study("tiny.yaml", "--seeds", "1", "--output", "mine")[0] == 0


def test_a_folder_that_cannot_be_written_is_not_blamed_on_the_record(home, fake, study, monkeypatch):
    from basisadapt.study.drive import paths

    (home / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(paths.os, "access", lambda path, mode: path != Path("out"))
        code, _, err = study("tiny.yaml", "--seeds", "1", "--output", "out")
    assert (code, fake.ran) == (2, [])
    assert "--output 'out' cannot be written" in err

    write = Path.write_bytes

    def full(path, content):
        if path.parent == Path("out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, _, err = study("tiny.yaml", "--seeds", "1", "--output", "out")
    assert code == 1
    assert "error: --output 'out' cannot be written: No space left on device. The record is kept; to resume:" in err


def test_a_copy_that_fails_names_what_was_not_written():
    from basisadapt.study.record.stores import store_reason

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from/result.json", None, "/there/result.json")
    assert store_reason(error) == "No space left on device: '/there/result.json'"
    error = RuntimeError(
        "database is locked\n[SQL: SELECT 1]\n(Background on this error at: https://sqlalche.me/e/20/e3q8)"
    )
    assert store_reason(error) == "RuntimeError: database is locked"
    error = RuntimeError("database is locked (Background on this error at: https://sqlalche.me/e/20/e3q8)")
    assert store_reason(error) == "RuntimeError: database is locked"


@pytest.mark.parametrize("label", ["=1+1", "+1", "-2+cmd", "@sum"])
def test_a_label_is_no_formula(home, fake, study, label):
    text = (home / "tiny.yaml").read_text().replace("label: LoRA", f"label: {json.dumps(label)}")
    (home / "tiny.yaml").write_text(text.replace("reference: LoRA\n", ""))
    assert study("tiny.yaml", "--seeds", "1", "--output", "out")[0] == 0
    assert f"\n'{label}," in (home / "out" / "table.csv").read_text()


def test_a_label_is_no_line_and_no_html(home, fake, study):
    label = "a\nb | <img src=x onerror=alert(1)> < c"
    text = (home / "tiny.yaml").read_text().replace("label: LoRA", f"label: {json.dumps(label)}")
    (home / "tiny.yaml").write_text(text.replace("reference: LoRA\n", ""))
    assert study("tiny.yaml", "--seeds", "1", "--output", "out")[0] == 0
    table = (home / "out" / "table.md").read_text()
    assert "\n| a b \\| &lt;img src=x onerror=alert(1)> < c |" in table
    assert "<img" not in table


def test_a_note_of_mlflow_has_no_line_and_no_html_of_others(home, fake, study, runs):
    bad, error = "a\nb <img src=x>", RuntimeError("c <script>")
    (home / "tiny.yaml").write_text((home / "tiny.yaml").read_text().replace("LoRA", json.dumps(bad)))

    def score(config):
        if config.method != "lora":
            raise error
        return 0.5

    fake.score = score
    assert study("tiny.yaml", "--seeds", "1")[0] == 1
    lora, failed, _ = (run.data.tags["mlflow.note.content"] for run in runs())
    assert lora.startswith("**a b &lt;img src=x>, seed 1**: finished\n")
    assert failed == "Failed: RuntimeError: c &lt;script>"
    result = RunResult("finished", "accuracy", {"accuracy": 0.5}, warnings=[bad])
    assert cell_note(resolve(read_spec("tiny.yaml")).cells[0], result).endswith("\n- Warning: a b &lt;img src=x>")


def test_nothing_that_is_said_steers_the_terminal(capsys):
    from basisadapt.core.command import guarded, print_error, say

    @guarded
    def main(arguments):
        say("a\x1b[2Jb\x9b\r\tc\nd\u202ee")
        print_error("e\x1b]0;f\x07")
        print("\rbar g\x1b[8m\rh\r", file=sys.stderr)
        raise ValueError("i\x1b[2J")

    main([])
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2Jb\\x9b\\x0d\tc\nd\\u202ee\n"
    assert err.startswith("basisadapt: error: e\\x1b]0;f\\x07\n\rbar g\\x1b[8m\\x0dh\r\nTraceback")
    assert err.endswith("ValueError: i\\x1b[2J\n")


def test_no_label_and_no_error_of_a_cell_steers_the_terminal(home, fake, study):
    label, error = "a\x1b]0;b\x07", RuntimeError("c\x1b[2Jd\re")
    (home / "tiny.yaml").write_text(
        (home / "tiny.yaml").read_text().replace("LoRA", json.dumps(label)).replace("[sinc, fourier]", "[sinc]")
    )

    def score(config):
        if config.method == "lora":
            raise error
        return 0.5

    fake.score = score
    code, out, err = study("tiny.yaml", "--seeds", "1")
    assert code == 1
    assert "[1/2] a\\x1b]0;b\\x07, seed 1: failed: RuntimeError: c\\x1b[2Jd" in err
    for said in (out, err):
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", said)


def test_a_server_that_is_not_there_is_not_waited_for(folder, monkeypatch, study):
    slept = []
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setattr("time.sleep", slept.append)
    code, _, err = study("--report", "tiny.yaml", "--tracking-uri", "http://127.0.0.1:9")
    assert code == 2
    assert "--tracking-uri 'http://127.0.0.1:9' cannot be opened" in err
    assert sum(slept) < 30
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
