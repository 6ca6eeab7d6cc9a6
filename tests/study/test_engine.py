from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
from forked import Forked

from basisadapt import training
from basisadapt.core.errors import InputError
from basisadapt.study.__main__ import _check_together, _parser, main
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.spec import read_spec
from basisadapt.study.record.content import parameters_of
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.record import Record

ALL = [(name, seed) for seed in (1, 2, 3) for name in ("lora", "sinc", "fourier")]


def table_of(out):
    return out.split("\nRecorded in")[0]


def states(found):
    return [run.info.status for run in found]


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


def test_the_cells_of_a_live_process_are_left_alone_and_awaited(home, fake, study, runs, monkeypatch):
    from basisadapt.study.drive import loop

    spec = read_spec("tiny.yaml")
    cell = resolve(spec, seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of(other.pid)
    with monkeypatch.context() as as_other:
        as_other.setattr(Owner, "me", lambda: owner)
        run_id = record.start(record.begin(spec, {}), cell)

    def other_finishes(_seconds):
        assert [run.info.status for run in runs()].count("RUNNING") == 1
        record.finish(run_id, cell, fake.run(cell.config, on_step=lambda *_: None), {})

    monkeypatch.setattr(loop.time, "sleep", other_finishes)
    code, _, err = study("tiny.yaml", "--seeds", "1")
    other.communicate()
    assert code == 0
    assert "waiting for another process to finish sinc, seed 1" in err
    assert fake.ran == [("lora", 1), ("fourier", 1), ("sinc", 1)]  # the last by the other
    assert len(runs()) == 3


def test_of_two_processes_that_start_a_cell_the_later_gives_way(home, monkeypatch):
    spec = read_spec("tiny.yaml")
    cell = resolve(spec, seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
    parent = record.begin(spec, {})
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of(other.pid)
    with monkeypatch.context() as as_other:
        as_other.setattr(Owner, "me", lambda: owner)
        first = record.start(parent, cell)
    assert record.start(parent, cell) is None
    assert record.outcomes()[cell.key].run_id == first
    other.communicate()
    assert record.start(parent, cell) is not None


def test_a_cell_whose_process_dies_while_it_is_awaited_is_run(home, fake, study, runs, monkeypatch):
    from basisadapt.study.drive import loop

    spec = read_spec("tiny.yaml")
    record = Record("sqlite:///mlflow.db", "tiny")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of(other.pid)
    with monkeypatch.context() as as_other:
        as_other.setattr(Owner, "me", lambda: owner)
        record.start(record.begin(spec, {}), resolve(spec, seeds=[1]).cells[0])
    monkeypatch.setattr(loop.time, "sleep", lambda _seconds: other.communicate())
    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    assert fake.ran == [("lora", 1), ("fourier", 1), ("sinc", 1)]
    assert sorted(states(runs())) == ["FINISHED"] * 3 + ["KILLED"]


def test_owners():
    me = Owner.me()
    assert Owner.parse(str(me)) == me
    assert not me.is_dead
    assert Owner(me.host, me.pid, me.started + "1").is_dead  # the number is used by another process now
    elsewhere = Owner("another-host", 1, "1")
    assert (elsewhere.is_here, elsewhere.is_dead) == (False, False)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of(child.pid)
    assert not owner.is_dead
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_dead  # a zombie
    child.wait()
    assert owner.is_dead


def test_a_killed_driver_is_cleared_up_and_the_table_is_that_of_an_undisturbed_study(
    home, fake, study, runs, trials, empty_databases, tmp_path_factory
):
    import shutil
    import time

    fake.ways = {("fourier", 2): "hang"}
    driver = Forked([sys.executable, "-m", "basisadapt.study", "tiny.yaml"], stderr=subprocess.PIPE)
    fake.ways = {}
    deadline = time.monotonic() + 120
    while not (home / "hanging").exists():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    assert states(runs()) == ["FINISHED"] * 5 + ["RUNNING"]
    assert trials()[5].state.name == "RUNNING"

    code, out, _ = study("tiny.yaml")
    assert (code, fake.ran) == (0, ALL[5:])
    assert states(runs()) == ["FINISHED"] * 5 + ["KILLED"] + ["FINISHED"] * 4
    assert states(runs(parents=True)) == ["KILLED", "FINISHED"]
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 5 + ["FAIL"] + ["COMPLETE"] * 4

    undisturbed = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(empty_databases / "mlflow.db", undisturbed / "mlflow.db")
    _, expected, _ = study("tiny.yaml", "--tracking-uri", f"sqlite:///{undisturbed}/mlflow.db")
    assert table_of(out) == table_of(expected)
    assert (undisturbed / "optuna.db").exists()


def test_a_driver_killed_between_mlflow_and_optuna(home, fake, study, trials):
    """Its trial is completed, not run again: MLflow has the last word."""
    import optuna

    study("tiny.yaml", "--seeds", "1")
    gone = str(Owner(Owner.me().host, Owner.me().pid, "0"))
    (home / "optuna.db").unlink()
    lost = optuna.create_study(study_name="tiny", storage="sqlite:///optuna.db", direction="maximize").ask()
    cell = resolve(read_spec("tiny.yaml"), seeds=[1]).cells[0]
    lost.set_user_attr("owner", gone)
    lost.set_user_attr("cell", cell.key)
    study("tiny.yaml", "--seeds", "1")
    assert [trial.state.name for trial in trials()] == ["COMPLETE"] * 3
    assert trials()[0].value == Record("sqlite:///mlflow.db", "tiny").outcomes()[cell.key].value
    assert len(fake.ran) == 3


def test_dry_run_counts_and_leaves_nothing(folder, fake, study):
    code, out, _ = study("tiny.yaml", "--dry-run", "--set", "adapter.r=8")
    assert code == 0
    assert "Two bases: 9 cells" in out
    assert "Of each: backbone minilm, task docstrings, rate 0.002, length 5 steps, batch 16" in out
    assert "training rows all, test rows all, precision fp32\nTo download from the hub: nothing\n" in out
    assert [line.split()[0] for line in out.splitlines()[5:]] == [
        n for n in ("sinc", "fourier", "LoRA") for _ in range(3)
    ]
    assert "8,110" in out
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


def test_dry_run_says_what_differs_and_what_would_be_downloaded(home, fake, study, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("basisadapt.tasks.hub.is_cached", lambda _: False)
    changes = ["--set", "sweep.task=docstrings,glue/rte", "--set", "backbone=qwen2-0.5b", "--seeds", "1"]
    code, out, _ = study("tiny.yaml", "--dry-run", *changes, "--set", "train.max_steps=null")
    assert code == 0
    assert "Of each: backbone qwen2-0.5b, rate 0.002, length 3 epochs" in out
    assert "To download from the hub: backbone Qwen/Qwen2-0.5B, data nyu-mll/glue\n" in out
    rows = [line.split() for line in out.splitlines()[4:]]
    assert rows[0][:3] == ["row", "task", "seed"]
    assert [row[2] for row in rows[1:5]] == ["docstrings", "glue/rte"] * 2, "after the two words of the label"


@pytest.mark.parametrize("hub", ["backbone", "data"])
def test_a_hub_that_cannot_be_reached_fails_once_and_before_anything_is_recorded(home, fake, study, monkeypatch, hub):
    asked = []

    def fail(*arguments):
        asked.append(arguments)
        raise socket.gaierror(-2, "Name or service not known") if hub == "backbone" else InputError("no network")

    if hub == "backbone":
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
        change, message = "backbone=qwen2-0.5b", "is neither a folder nor in the cache, and the hub cannot be reached"
    else:
        monkeypatch.setattr("basisadapt.tasks.hub.is_cached", lambda _: False)
        monkeypatch.setattr(training, "load_data", fail)
        change, message = "task=glue/rte", "no network"
    code, _, error = study("tiny.yaml", "--set", change)
    assert (code, len(asked), fake.ran) == (2, 1, [])
    assert message in error
    assert Record.read("sqlite:///mlflow.db", "tiny") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate_bases"], "did you mean 'ablate_basis'"),
        (["tiny.yaml", "--set", "adapter.q=1"], "unknown key 'adapter.q'"),
        (["tiny.yaml", "--set", "train.max_steps=soon"], "train.max_steps must be a whole number or null"),
        (["tiny.yaml", "--set", "adapter.r=999"], "adapter.r must be at most 384"),  # plan()'s answer
        (["tiny.yaml", "--seeds", "one"], "--seeds needs whole numbers"),
        (["tiny.yaml", "--seeds=-1"], "seeds must be whole numbers of at least 0"),
        (["tiny.yaml", "--preset", "huge"], "invalid choice: 'huge'"),
        (["tiny.yaml", "--data-dir", "absent"], "data folder 'absent' cannot be read"),
        (["tiny.yaml", "--plugin", "absent.py"], "does not exist"),
        (["tiny.yaml", "--plugin", "broken.py"], "does not import: ZeroDivisionError"),
        (["tiny.yaml", "--plugin", "no.such.module"], "does not import: ModuleNotFoundError"),
        (["tiny.yaml", "--tracking-uri", "sqlite:///absent/mlflow.db"], "--tracking-uri 'sqlite:///absent"),
        (["tiny.yaml", "--storage", "sqlite:////proc/optuna.db"], "--storage 'sqlite:////proc/optuna.db'"),
        (["tiny.yaml", "--storage", "sqlite:///broken.py"], "file is not a database"),
        (["tiny.yaml", "--tracking-uri", "postgres://x"], "--tracking-uri 'postgres://x' cannot be opened"),
        (["tiny.yaml", "--tracking-uri", "./folder"], "--tracking-uri './folder' cannot be opened"),
        (["tiny.yaml", "--storage", "nosql://x"], "--storage 'nosql://x' cannot be opened"),
        (["tiny.yaml", "--storage", "sqlite:///mlflow.db"], "cannot share one database"),
        (["tiny.yaml", "--output", "broken.py"], "--output 'broken.py' cannot be made"),
        (["--report", "tiny.yaml"], "nothing of study 'tiny' is recorded"),
        ([], "give the NAME of a study"),
        (["tiny.yaml", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, fake, study, arguments, message):
    (folder / "broken.py").write_text("1 / 0\n" * 200)
    code, out, err = study(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("basisadapt: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert fake.ran == []
    assert sorted(path.name for path in folder.iterdir()) == ["broken.py", "tiny.yaml"]


def test_debug_shows_where_an_input_error_comes_from(folder, study):
    code, _, err = study("absent.yaml", "--debug")
    assert code == 2
    assert "Traceback" in err


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


def test_passwords_are_shown_nowhere(home, fake, study, monkeypatch, runs):
    from basisadapt.study import __main__ as program

    code, _, err = study("tiny.yaml", "--storage", "postgresql+nothing://me:s3cret@host/name")
    assert code == 2
    assert "me:***@host" in err
    assert "s3cret" not in err
    secret = "https://judge:s3cret@host/plugin"
    monkeypatch.setattr(program, "load_plugin", lambda plugin: None)
    assert study("tiny.yaml", "--seeds", "1", "--plugin", secret)[0] == 0
    (parent,) = runs(parents=True)
    assert "judge:***@host" in parent.data.tags["basisadapt.command"]
    assert "s3cret" not in str(parent.data)


def test_too_many_runs_for_an_address_have_no_link(home, fake, study, runs, monkeypatch):
    monkeypatch.setattr("basisadapt.study.record.record.MAX_COMPARED", 8)
    code, out, _ = study("tiny.yaml")
    assert code == 0
    assert "all runs, by invocation" in out
    assert "compare-runs" not in out
    (parent,) = runs(parents=True)
    assert parent.data.tags["mlflow.note.content"].startswith("**")


def test_a_reader_that_has_seen_enough_is_no_error():
    """python -m basisadapt.study --list | head"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "basisadapt.study", "--list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_help_and_list_do_without_torch(option):
    program = (
        "import sys\nfrom basisadapt.study.__main__ import main\n"
        f"try:\n    main([{option!r}])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'peft', 'transformers', 'pandas', 'matplotlib', 'scipy'}\n"
        "heavy &= sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ablate_basis" in done.stdout or "--tracking-uri" in done.stdout


@pytest.mark.parametrize("module", ["basisadapt", "basisadapt.study"])
def test_the_version_is_the_packages(module):
    """That of pyproject.toml, by either name of the command."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"basisadapt {project['version']}\n", "")


def test_the_examples_of_help_are_command_lines(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.split("\nExamples:\n")[1].split("\n\n")[0].splitlines()
    assert 4 <= len(lines) <= 6
    for line in lines:
        options = _parser().parse_args(line.split()[3:])
        _check_together(options)
        read_spec(options.name or options.report)
