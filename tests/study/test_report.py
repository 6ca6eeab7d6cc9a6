"""A report as text, Markdown and CSV, its columns and its notes."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest
from common import SOUND, add, no_pictures, outcome, outcomes, reported

from basisadapt.diagnostics.diagnostic import DIAGNOSTICS, Diagnostic
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.notes import cell_note
from basisadapt.study.report import report, text
from basisadapt.study.report.files import report_files
from basisadapt.study.report.footnotes import problems
from basisadapt.study.report.table import build_table
from basisadapt.training import RunResult

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


@pytest.mark.parametrize(
    ("value", "printed"), [(4.2, "4.2000 ± 0.0000"), (9999.5, "9999.5000 ±"), (12345.678, "12345.7 ± 0.0")]
)
def test_a_metric_that_is_no_fraction_is_not_scaled(two_bases, value, printed):
    found = reported(two_bases, [value] * 9, headline="score")
    assert not found.table.percent
    assert printed in text.to_text(found)


def test_a_study_may_name_further_columns(folder):
    add(folder, "columns: [active_n.mean, parameters.transfer, no.such]\n")
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


def test_costs_have_units(folder):
    add(folder, "columns: [memory.peak_bytes, adapter.bytes, tokens_per_second]\n")
    costs = {"memory.peak_bytes": 1.5e9, "adapter.bytes": 688_992.0, "tokens_per_second": 1234.5}
    found = reported(resolve(read_spec("tiny.yaml")), SOUND, **costs)
    (header,) = (line for line in text.to_markdown(found).splitlines() if line.startswith("| row"))
    assert header.endswith("| peak memory, MB | adapter, MB | tokens/s |")
    line = next(line for line in text.to_text(found).splitlines() if line.startswith("fourier"))
    assert line.split()[-3:] == ["1,500", "0.69", "1,234"]
    assert float(next(csv.DictReader(io.StringIO(text.to_csv(found.table))))["adapter.bytes"]) == 688_992, "as recorded"


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
