"""A study that is run, interrupted and resumed, and what its cells leave in the record."""

from __future__ import annotations

import json
from pathlib import Path

from common import ALL, states, table_of

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.content import parameters_of
from basisadapt.study.record.record import Record


def test_a_study_is_run_once_and_its_table_stays(home, fake, study, runs, trials):
    code, out, err = study("tiny.yaml", "--output", "results")
    assert code == 0
    assert fake.ran == ALL
    assert "[9/9] fourier, seed 3: accuracy 0." in err
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in out
    assert "/#/compare-runs?runs=[%22" in out

    again_code, again, err = study("tiny.yaml")
    assert (again_code, table_of(again), err) == (0, table_of(out), "")
    assert len(fake.ran) == 9
    assert states(runs()) == ["FINISHED"] * 9
    assert states(runs(parents=True)) == ["FINISHED"] * 2
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 9

    assert (home / "results" / "table.txt").read_text() in again
    assert sorted(path.name for path in (home / "results").iterdir()) == [
        "comparison.png",
        "report.html",
        "table.csv",
        "table.md",
        "table.txt",
    ]
    code, report, _ = study("tiny.yaml", "--report", "tiny.yaml")
    assert code == 2
    code, report, _ = study("--report", "tiny.yaml")
    assert (code, table_of(report)) == (0, table_of(again))
    assert len(runs(parents=True)) == 2


def test_what_a_cell_leaves_in_mlflow(home, fake, drawn, study, runs, trials):
    study("tiny.yaml", "--seeds", "1")
    run, parent = runs()[1], runs(parents=True)[0]
    assert run.info.run_name == "sinc seed 1"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["status"] == "finished"
    assert run.data.tags["environment.torch"] == "2"
    assert run.data.tags["mlflow.source.git.commit"] == "abc123"
    # What the rows set, then what all methods have; each setting once, of the adapter without "adapter.".
    cell = resolve(read_spec("tiny.yaml"), seeds=[1]).cells[0]
    assert list(parameters_of(cell))[:5] == ["row", "seed", "basis", "method", "task"]
    assert run.data.params == parameters_of(cell)
    assert (run.data.params["backbone"], run.data.params["r"], run.data.params["train.lr"]) == ("minilm", "4", "0.002")
    lora = next(cell for cell in resolve(read_spec("tiny.yaml"), seeds=[1]).cells if cell.row == "LoRA")
    assert set(parameters_of(lora)) == set(run.data.params) - {"basis"}, "rows differ in what the study varies alone"
    assert set(run.data.params) - {"row", "basis"} == {name.removeprefix("adapter.") for name in lora.settings}
    assert 0.6 < run.data.metrics["accuracy"] < 0.9  # not the curve's last value, 0.2
    assert run.data.metrics["curve/accuracy"] == 0.2
    assert run.data.metrics["stable_rank/encoder.layer.0.attention.self.query"] == 1.2

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    loss = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in loss] == [(1, 2.0), (3, 1.0)]  # NaN is left out
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    config = json.loads((artifacts / "config.json").read_text())
    assert (config["train"]["max_steps"], config["adapter"]["basis"], config["seed"]) == (5, "sinc", 1)
    assert artifacts.is_relative_to(home / "mlruns" / "tiny")
    assert sorted(path.name for path in artifacts.iterdir()) == [
        "config.json",
        "modules.png", "phi.png", "result.json", "stable_rank.png", "training.png",
    ]  # fmt: skip
    assert json.loads((artifacts / "result.json").read_text())["config"]["adapter"]["basis"] == "sinc"
    files = sorted(file.path for file in client.list_artifacts(parent.info.run_id))
    assert files == ["comparison.png", "report.html", "table.csv", "table.md", "table.txt"]
    experiment = client.get_experiment_by_name("tiny")
    assert "How to compare" in experiment.tags["mlflow.note.content"]
    assert "| sinc |" in parent.data.tags["mlflow.note.content"]
    trial = trials()[1]
    assert (trial.value, trial.user_attrs["cell"]) == (
        run.data.metrics["accuracy"],
        run.data.tags["basisadapt.cell"],
    )
    assert json.loads(trial.user_attrs["config"])["seed"] == 1


def test_a_failed_cell_is_kept_the_others_go_on_and_it_is_run_again(home, fake, study, runs, trials):
    fake.ways = {("sinc", 2): "raise"}
    code, out, err = study("tiny.yaml")
    assert (code, fake.ran) == (1, ALL)
    assert "1 of 3 failed" in out
    assert "Failed: sinc seed 2 (RuntimeError: out of memory)." in out
    assert "sinc, seed 2: failed: RuntimeError: out of memory" in err
    failed = runs()[4]
    assert (failed.info.status, failed.data.tags["status"]) == ("FAILED", "failed")
    traceback = Path(failed.info.artifact_uri.removeprefix("file://")) / "traceback.txt"
    assert "raise RuntimeError" in traceback.read_text()
    assert trials()[4].state.name == "FAIL"

    fake.ways = {}
    code, out, _ = study("tiny.yaml")
    assert (code, fake.ran[9:]) == (0, [("sinc", 2)])
    assert "failed" not in out


def test_a_diverged_cell_counts_as_done(home, fake, study, runs, trials):
    fake.ways = {("fourier", 3): "diverge"}
    code, out, _ = study("tiny.yaml")
    assert code == 1
    assert "1 of 3 diverged" in out
    assert "Diverged: fourier seed 3." in out
    assert study("tiny.yaml")[:2] == (1, out)
    assert len(fake.ran) == 9
    assert runs()[8].data.tags["status"] == "diverged"
    assert [trial.state.name for trial in trials()].count("FAIL") == 1


def test_a_result_without_its_headline_metric_is_a_failure(home, fake, study, monkeypatch):
    import dataclasses

    from basisadapt.training import running

    def forgetful(*args, **options):
        return dataclasses.replace(fake.run(*args, **options), headline="f1")

    monkeypatch.setattr(running, "run", forgetful)
    code, out, _ = study("tiny.yaml", "--seeds", "1")
    assert code == 1
    assert "the run gave no finite 'f1'" in out


def test_interrupt_and_resume(home, fake, study, runs, trials):
    fake.ways = {("fourier", 1): "interrupt"}
    code, _, err = study("tiny.yaml")
    assert code == 130
    assert "to resume: python -m basisadapt.study tiny.yaml" in err
    assert states(runs()) == ["FINISHED"] * 2 + ["KILLED"]
    assert states(runs(parents=True)) == ["KILLED"]
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 2 + ["FAIL"]

    fake.ways, fake.ran = {}, []
    code, out, _ = study("tiny.yaml")
    assert (code, fake.ran) == (0, ALL[2:])
    assert " killed" not in out


def test_only_the_cells_of_the_invocation_are_shown(home, fake, study):
    study("tiny.yaml", "--seeds", "1,2")
    code, out, _ = study("tiny.yaml", "--set", "sweep.basis=sinc,bspline", "--seeds", "1,2")
    assert (code, fake.ran[6:]) == (0, [("bspline", 1), ("bspline", 2)])
    assert "fourier" not in out


def test_of_two_finished_runs_of_a_cell_the_earlier_counts(home, fake, study):
    cell = resolve(read_spec("tiny.yaml"), seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
    parent = record.begin(read_spec("tiny.yaml"), {})
    first, second = record.start(parent, cell), record.start(parent, cell)
    for run_id in (second, first):
        record.finish(run_id, cell, fake.run(cell.config, on_step=lambda *_: None), {})
    assert record.outcomes()[cell.key].run_id == second
    assert record.start(parent, cell) is None


def test_optuna_learns_what_mlflow_knows(home, fake, study, trials, empty_databases):
    fake.ways = {("sinc", 1): "diverge"}
    study("tiny.yaml")
    values = [trial.value for trial in trials()]
    (home / "optuna.db").unlink()
    study("tiny.yaml")
    assert [trial.value for trial in trials()] == values
    study("tiny.yaml")
    assert len(trials()) == 9


def test_a_plugin_becomes_a_row(home, fake, study):
    (home / "my_bases.py").write_text(
        "import torch\nfrom basisadapt import TransferBasis\n\n\n"
        'class Ripple(TransferBasis, name="ripple_of_test"):\n'
        '    """A cosine under a bell."""\n\n'
        "    def forward(self, u):\n        return torch.cos(5 * u) * torch.exp(-u.square() / 2)\n"
    )
    arguments = (
        "tiny.yaml",
        "--seeds",
        "1",
        "--plugin",
        "my_bases.py",
        "--set",
        "sweep.basis=sinc,ripple_of_test",
    )
    code, out, _ = study(*arguments)
    assert code == 0
    assert "\nripple_of_test " in out
