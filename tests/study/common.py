"""What tests of studies share: what is printed of a study, and outcomes that no run had."""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path

from basisadapt.study.outcome import Outcome
from basisadapt.study.report import report
from basisadapt.study.report.table import build_table

SEEDS = ("--seeds", "1,2,3,4,5,6,7,8")  # with three rows, 24 cells
STUDY = [sys.executable, "-m", "basisadapt.study", "tiny.yaml", *SEEDS]
ALL = [(name, seed) for seed in (1, 2, 3) for name in ("lora", "sinc", "fourier")]  # as they run
SOUND = [0.80, 0.85, 0.79, 0.70, 0.71, 0.75, 0.75, 0.84, 0.77]  # of the cells of tiny.yaml


def add(folder, text):
    """Append to the file of the study."""
    path = folder / "tiny.yaml"
    path.write_text(path.read_text() + text)


def table_of(out):
    return out.split("\nRecorded in")[0]


def states(found):
    """MLflow's word on each run."""
    return [run.info.status for run in found]


def statuses(found):
    """Our word on each run."""
    return [run.data.tags["status"] for run in found]


def eventually(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_whole(uri, storage, expected):
    """24 cells, one finished run each with all that belongs to it, nothing open; returns how runs ended."""
    import mlflow
    import optuna

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=5000)
    assert "RUNNING" not in {run.info.status for run in runs}
    finished = [run for run in runs if run.data.tags.get("status") == "finished" and "basisadapt.cell" in run.data.tags]
    assert collections.Counter(run.data.tags["basisadapt.cell"] for run in finished) == dict.fromkeys(expected, 1)
    for run in finished:
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.json", "result.json", "stable_rank.png", "training.png"} <= names
        whole = json.loads(Path(client.download_artifacts(run.info.run_id, "result.json")).read_text())
        assert whole["metrics"]["accuracy"] == run.data.metrics["accuracy"]
    trials = optuna.load_study(study_name="tiny", storage=storage).get_trials()
    done = collections.Counter(trial.user_attrs["cell"] for trial in trials if trial.state.name == "COMPLETE")
    assert done == dict.fromkeys(expected, 1)
    assert "RUNNING" not in {trial.state.name for trial in trials}
    return collections.Counter(run.data.tags.get("status", run.info.status) for run in runs)


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
