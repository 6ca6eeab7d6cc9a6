from __future__ import annotations

import shutil
from pathlib import Path

import fakes
import pytest
import quick
from common import SEEDS, table_of
from forked import IN_PLACE

from basisadapt.study.__main__ import main
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.report import files
from basisadapt.tasks import hub
from basisadapt.training import planning, running
from basisadapt.training.execution import workers

STUDY = """
title: Two bases
question: Which is better?
answers: {table: table_13.csv, key: config, column: accuracy_mean, std: accuracy_std, setting: Qwen2}
base: {task: docstrings, backbone: minilm, method: phi, adapter: {r: 4}, train: {lr: 2e-3}}
sweep: {basis: [sinc, fourier]}
beside:
  - {label: LoRA, set: {method: lora}}
reference: LoRA
seeds: [1, 2, 3]
presets: {smoke: {train.max_steps: 2, seeds: [1]}, quick: {train.max_steps: 5}}
"""


@pytest.fixture(autouse=True, scope="session")
def _unhurried():
    with quick.unhurried():
        yield


@pytest.fixture(scope="session")
def empty_databases(tmp_path_factory):
    """Making MLflow's tables takes seconds: once for all tests."""
    folder = tmp_path_factory.mktemp("databases")
    from basisadapt.study.record.record import Record
    from basisadapt.study.record.trials import Trials

    Record(f"sqlite:///{folder}/mlflow.db", "none")
    Trials(f"sqlite:///{folder}/optuna.db", "none")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory: a study file and nothing else."""
    (tmp_path / "tiny.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def home(folder, empty_databases):
    """The current directory: a study file and empty databases."""
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(empty_databases / name, folder / name)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, those of equal results once, but not drawn, which takes most of a cell's time: see `drawn`."""
    for (module, name), replaced in quick.UNDRAWN.items():
        monkeypatch.setattr(module, name, replaced)


@pytest.fixture
def fake(undrawn, monkeypatch):
    """Replaces training, for which the hub is not asked; `fake.ways` says how runs end, `fake.ran` what was run.

    One core, so that it runs here.
    """
    fake = fakes.Fakes()
    monkeypatch.setattr(hub, "is_cached", lambda source: True)
    monkeypatch.setattr(running, "run", fake.run)
    monkeypatch.setattr(planning, "plan", fake.plan)
    monkeypatch.setattr(workers, "cores", lambda: 1)
    return fake


@pytest.fixture
def drawn_reports(fake, monkeypatch):
    """Has the figures of reports drawn."""
    monkeypatch.setattr(files, "_png", quick.DRAWN[files, "_png"])


@pytest.fixture
def drawn(drawn_reports, monkeypatch):
    """Has all figures drawn."""
    for (module, name), drawn in quick.DRAWN.items():
        monkeypatch.setattr(module, name, drawn)


@pytest.fixture
def faking(home, fake, monkeypatch):
    """Writes a plug-in that fakes training, here and in workers; returns the options that load it.

    Workers are forks, see `Forked`.
    """
    monkeypatch.setattr(workers, "subprocess", IN_PLACE)

    def write(ways=None, seconds=0.0):
        text = f"import sys\n\nsys.path.insert(0, {str(Path(fakes.__file__).parent)!r})\n"
        text += f"import fakes\n\nfakes.Fakes({ways or {}!r}, {seconds}).install()\n"
        (home / "faking.py").write_text(text)
        return "--plugin", "faking.py"

    return write


@pytest.fixture
def study(capsys):
    """Calls the command line: exit code, stdout, stderr."""

    def call(*arguments):
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def runs():
    """The MLflow runs of the study: children, or parents."""
    import mlflow

    def read(parents=False):
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")
        experiment = client.get_experiment_by_name("tiny")
        found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
        return [run for run in found if ("mlflow.parentRunId" in run.data.tags) != parents]

    return read


@pytest.fixture
def trials():
    """The trials of the Optuna study."""
    import optuna

    return lambda: optuna.load_study(study_name="tiny", storage="sqlite:///optuna.db").get_trials()


@pytest.fixture
def undisturbed(home, fake, study, empty_databases, tmp_path_factory):
    """The table of the 24 cells as one driver makes it that nothing happens to, and the cells' keys."""
    from basisadapt.study.record.record import Record

    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(empty_databases / "mlflow.db", folder)
    uri = f"sqlite:///{folder}/mlflow.db"
    _, out, _ = study("tiny.yaml", *SEEDS, "--tracking-uri", uri)
    return table_of(out), list(Record(uri, "tiny").outcomes())


@pytest.fixture
def two_bases(folder):
    return resolve(read_spec("tiny.yaml"))
