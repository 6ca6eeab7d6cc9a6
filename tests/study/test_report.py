from __future__ import annotations

import csv
import io

import pytest

from basisadapt.study import report
from basisadapt.study.record import Outcome
from basisadapt.study.spec import read_spec, resolve


@pytest.fixture
def two_bases(folder):
    return resolve(read_spec("tiny.yaml"))


def outcome(cell, value=None, status="finished", warnings=(), error="", headline="accuracy"):
    metrics = {"stable_rank.mean": 1.5, "dc_share.mean": 0.25, "parameters.trainable": 4321.0}
    if value is not None:
        metrics[headline] = value
    return Outcome(f"run-{cell.key}", cell.key, status, headline, metrics, tuple(warnings), error, None, 0)


def outcomes(study, values, **options):
    return {cell.key: outcome(cell, value, **options) for cell, value in zip(study.cells, values, strict=True)}


SOUND = [0.80, 0.85, 0.79, 0.70, 0.71, 0.75, 0.75, 0.84, 0.77]


TEXT = """\
Two bases

row       accuracy, %  seeds  difference to LoRA (95 % CI)  p (Holm)  stable rank  DC share  trainable   published
-------  ------------  -----  ----------------------------  --------  -----------  --------  ---------  ----------
sinc     81.33 ± 3.21      3          +2.67 [-2.50, +7.84]     0.313         1.50     0.250      4,321  61.1 ± 0.2
fourier  72.00 ± 2.65      3         -6.67 [-20.79, +7.46]     0.313         1.50     0.250      4,321  59.2 ± 0.5
LoRA     78.67 ± 4.73      3                             -         -         1.50     0.250      4,321           -

Mean ± sample standard deviation over 3 seeds (1, 2, 3).
Differences to LoRA are paired by seed: mean, 95 % confidence interval (t), two-sided paired t-test, Holm-corrected \
for 2 tests.
Published: the paper's table 13 (Qwen2). On another backbone and task, only the order of the rows can be compared.
"""


def test_text(two_bases):
    text = report.to_text(report.build_table(two_bases, outcomes(two_bases, SOUND)))
    assert text == TEXT


def test_markdown_has_as_many_columns_in_every_row(two_bases):
    lines = report.to_markdown(report.build_table(two_bases, outcomes(two_bases, SOUND))).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10}
    assert len(rows) == 5


def test_csv_holds_the_numbers(two_bases):
    text = report.to_csv(report.build_table(two_bases, outcomes(two_bases, SOUND)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert float(rows[0]["mean"]) == pytest.approx(2.44 / 3)
    assert float(rows[0]["difference"]) == pytest.approx(0.08 / 3)
    assert (rows[0]["n"], rows[0]["states"], rows[0]["published"]) == ("3", "finished: 1 2 3", "61.1")
    assert rows[2]["p_holm"] == ""


def test_one_seed_has_no_deviation_and_no_test(folder):
    study = resolve(read_spec("tiny.yaml"), seeds=[1])
    text = report.to_text(report.build_table(study, outcomes(study, [0.5, 0.6, 0.55])))
    assert "One seed a row (1): no deviation, interval or test." in text
    sinc = next(line for line in text.splitlines() if line.startswith("sinc"))
    assert sinc.split() == ["sinc", "50.00", "1", "-5.00", "-", "1.50", "0.250", "4,321", "61.1", "±", "0.2"]


def test_a_metric_that_is_no_fraction_is_not_scaled(two_bases):
    table = report.build_table(two_bases, outcomes(two_bases, [4.2] * 9, headline="score"))
    assert not table.percent
    assert "4.2000 ± 0.0000" in report.to_text(table)


def test_mixed_states(two_bases):
    known = outcomes(two_bases, SOUND)
    cells = two_bases.cells
    known[cells[0].key] = outcome(cells[0], status="failed", error="RuntimeError: out of memory")
    known[cells[1].key] = outcome(cells[1], status="diverged")
    known[cells[3].key] = outcome(cells[3], status="killed")
    del known[cells[4].key]
    for cell in cells[6:8]:
        known[cell.key] = outcome(cell, 0.5, warnings=["collapsed"])
    table = report.build_table(two_bases, known)
    text = report.to_text(table)
    assert table.unsound
    assert "1 of 3 failed, 1 of 3 diverged" in text
    assert "1 of 3 killed, 1 of 3 not run" in text
    assert "Failed: sinc seed 1 (RuntimeError: out of memory)." in text
    assert "Warning, LoRA seeds 1, 2: collapsed" in text
    assert not report.build_table(two_bases, {}).unsound
    assert "3 of 3 not run" in report.to_text(report.build_table(two_bases, {}))


def test_figures(two_bases, tmp_path):
    table = report.build_table(
        two_bases, {**outcomes(two_bases, SOUND), two_bases.cells[0].key: outcome(two_bases.cells[0])}
    )
    report.comparison_figure(table).savefig(tmp_path / "comparison.png")
    report.comparison_figure(report.build_table(two_bases, {})).savefig(tmp_path / "nothing.png")
