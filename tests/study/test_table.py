"""The table of a study: rows in every state, compared with their references, within a task and over all."""

from __future__ import annotations

import pytest
from common import SOUND, add, no_pictures, outcome, outcomes

from basisadapt.core.errors import InputError
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.published import published_values
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.report import report, text
from basisadapt.study.report.files import report_files
from basisadapt.study.report.table import build_table
from basisadapt.study.report.text_tables import text_tables


def test_a_column_may_be_a_quotient_of_two_metrics(folder):
    """Cell by cell, so that its mean is that of the quotients; without a divisor there is none."""
    add(folder, "columns: [bits / parameters.trainable, bits / zero]\n")
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
