"""How long a study may take, as it is said before it runs."""

from __future__ import annotations

import pytest

from basisadapt.study.drive.estimate import Estimate, estimate_time
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.training.execution.compute import Inline
from basisadapt.training.execution.executor import JobSettings
from basisadapt.training.execution.workers import Workers

ONE = Inline(JobSettings())
TUNE = "tune: {grid: {train.lr: [1e-3, 1e-2]}, seeds: [9], validation: 0.2}\n"


@pytest.fixture
def cells(folder):
    """Of sinc, fourier and LoRA, three each."""
    return resolve(read_spec("tiny.yaml")).cells


def took(cell, train, evaluation=0.0, status="finished"):
    seconds = {"seconds.train": train, "seconds.eval": evaluation}
    return {cell.key: Outcome("", cell.key, status, "accuracy", seconds, (), "")}


def test_a_row_is_known_by_itself_and_the_others_by_all(cells):
    outcomes = took(cells[0], 20.0, 10.0) | took(cells[3], 50.0, 40.0)
    # Two more of 30 s, two more of 90 s, and three of the mean, 60 s.
    assert estimate_time(cells, outcomes, ONE) == Estimate(2 * 30 + 2 * 90 + 3 * 60, 7, 2)
    assert estimate_time(cells, outcomes, Workers(2, JobSettings())).seconds == 420 / 2
    assert estimate_time(cells, outcomes, Workers(100, JobSettings())).seconds == 420 / 7
    assert estimate_time([*cells, *cells], outcomes, ONE).cells == 7, "a cell of two rows is run once"


def test_only_finished_cells_with_a_time_count_and_failed_ones_are_run_again(cells):
    assert estimate_time(cells, {}, ONE) is None
    assert estimate_time(cells, took(cells[0], 5.0, status="diverged"), ONE) is None
    outcomes = took(cells[0], 5.0) | took(cells[1], 1.0, status="failed")
    assert estimate_time(cells, outcomes, ONE) == Estimate(40.0, 8, 1)
    done = {key: outcome for cell in cells for key, outcome in took(cell, 1.0).items()}
    assert estimate_time(cells, done, ONE) is None, "nothing is missing"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (89, "89 s"), (720, "12 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_words(seconds, shown):
    assert str(Estimate(seconds, 18, 3)) == f"about {shown} for 18 cells, by 3 cells recorded"
    assert str(Estimate(seconds, 1, 1)) == f"about {shown} for 1 cell, by 1 cell recorded"


def test_it_is_said_before_a_run_and_in_a_dry_run(home, fake, study):
    fake.costs = lambda config: {"seconds.train": 100.0, "seconds.eval": 15.0, "seconds.observe": 5.0}
    _, _, error = study("tiny.yaml", "--seeds", "1")
    assert "about" not in error, "nothing is known yet"
    line = "about 12 min for 6 cells, by 3 cells recorded"
    code, printed, error = study("tiny.yaml", "--dry-run")
    assert (code, error) == (0, f"{line}\n")
    assert "about" not in printed
    assert study("tiny.yaml", "--dry-run", "--workers", "3")[2].startswith("about 4 min")
    assert study("tiny.yaml", "--preset", "smoke", "--dry-run")[2] == "", "of cells of another size nothing is known"
    assert study("tiny.yaml")[2].splitlines()[0] == line
    assert study("tiny.yaml")[2] == ""
    assert study("tiny.yaml", "--dry-run")[2] == ""


def test_trials_of_tuning_count(home, fake, study):
    (home / "tiny.yaml").write_text((home / "tiny.yaml").read_text() + TUNE)
    fake.costs = lambda config: {"seconds.train": 60.0}
    fake.ways = {("fourier", 1): "interrupt"}
    assert study("tiny.yaml")[0] == 130
    # 6 trials and the first cells of LoRA and sinc are done.
    assert study("tiny.yaml", "--dry-run")[2] == "about 7 min for 7 cells, by 8 cells recorded\n"
