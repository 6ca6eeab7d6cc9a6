"""Several studies, and several versions of one, in one database: every report is of its own cells."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def two_studies(home):
    """tiny.yaml, and other.yaml with the same configurations under another name."""
    (home / "other.yaml").write_text((home / "tiny.yaml").read_text().replace("Two bases", "Other bases"))
    return home


def test_two_studies_keep_to_themselves(two_studies, fake, study):
    fake.ways = {("sinc", 1): "raise"}
    assert study("tiny.yaml")[0] == 1
    fake.ways = {("fourier", 2): "diverge"}
    code, out, _ = study("other.yaml")
    assert (code, len(fake.ran)) == (1, 18)
    assert "Diverged: fourier seed 2." in out
    assert "Failed" not in out
    code, out, _ = study("--report", "tiny.yaml")
    assert code == 1
    assert "Failed: sinc seed 1 (RuntimeError: out of memory)." in out
    assert "Diverged" not in out


def test_of_a_renamed_axis_the_new_rows_are_shown_and_the_old_cells_stay(home, fake, study, runs):
    study("tiny.yaml", "--seeds", "1,2")
    path = home / "tiny.yaml"
    path.write_text(path.read_text().replace("sweep: {basis: [sinc, fourier]}", "sweep: {r: [4, 8]}"))
    code, out, _ = study("tiny.yaml", "--seeds", "1,2")
    assert code == 0
    rows = [line.split()[0] for line in out.partition("\n\n")[2].splitlines()[2:5]]
    assert rows == ["4", "8", "LoRA"]
    # The base's basis is sinc, so that r = 4 is the configuration that was the row "sinc": not run again.
    assert fake.ran[6:] == [("sinc", 1), ("sinc", 2)]
    assert [run.data.params["row"] for run in runs()].count("fourier") == 2
    _, report, _ = study("--report", "tiny.yaml", "--seeds", "1,2")
    assert "fourier" not in report.partition("\nRecorded")[0]


def test_the_report_of_one_failed_and_one_diverged_cell(home, fake, drawn, study, runs):
    fake.ways = {("sinc", 2): "raise", ("fourier", 3): "diverge"}
    code, out, _ = study("tiny.yaml", "--output", "results")
    assert code == 1
    parent = runs(parents=True)[0]
    logged = Path(parent.info.artifact_uri.removeprefix("file://")) / "report.html"
    page = logged.read_text()
    assert page == (home / "results" / "report.html").read_text()
    for text in (out, page, (home / "results" / "table.md").read_text()):
        assert "Failed: sinc seed 2 (RuntimeError: out of memory)." in text
        assert "Diverged: fourier seed 3." in text
        assert "1 of 3 failed" in text
        assert "1 of 3 diverged" in text
    assert "Cells: 7 finished, 1 failed, 1 diverged." in page
    # What is shown is over the two seeds that finished; with so few the difference is still paired.
    row = next(line for line in out.splitlines() if line.startswith("sinc"))
    assert "±" in row
    # The pictures of one finished cell of each row, and the comparison.
    drawn = {
        run.data.params["row"]: len(list(Path(run.info.artifact_uri.removeprefix("file://")).glob("*.png")))
        for run in runs()
        if run.data.tags["status"] == "finished"
    }
    assert all(drawn.values())
    assert page.count("<img ") == 1 + sum(drawn.values())
    assert "<dd>abc123</dd>" in page
