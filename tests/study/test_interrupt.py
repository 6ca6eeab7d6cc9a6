"""Finishing a cell is one step: nobody who listens no more, no signal and no store between makes it unfinished."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from common import states

from basisadapt.study.__main__ import main
from basisadapt.study.record.record import Record
from basisadapt.study.record.trials import Trials

SEED = ("tiny.yaml", "--seeds", "1")


def unheard(monkeypatch):
    """stderr becomes a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stderr", os.fdopen(write, "w"))


def test_a_closed_stderr_changes_nothing(home, fake, runs, trials, monkeypatch):
    with monkeypatch.context() as closed:
        unheard(closed)
        assert main(SEED) == 0
        fake.ways = {("sinc", 2): "raise"}
        assert main(["tiny.yaml", "--seeds", "2"]) == 1
        fake.ways = {("sinc", 2): "SIGINT"}
        assert main(["tiny.yaml", "--seeds", "2"]) == 130
        assert main(["absent.yaml"]) == 2
    assert sorted(states(runs())) == ["FAILED", *["FINISHED"] * 6]
    assert sorted(states(runs(parents=True))) == ["FINISHED", "FINISHED", "KILLED"]
    assert "RUNNING" not in {trial.state.name for trial in trials()}


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_while_a_cell_is_recorded_waits(home, fake, study, runs, trials, monkeypatch, signals, moment):
    close, sent = Record.close, []

    def send(kept):
        if kept and not sent:
            sent.extend(signals)
            for number in signals:
                os.kill(os.getpid(), number)

    def interrupted(self, run_id, status, *arguments, **options):
        cell = "basisadapt.cell" in self._client.get_run(run_id).data.tags
        send(moment == "before" and status == "finished" and cell)
        close(self, run_id, status, *arguments, **options)
        send(moment == "after" and status == "finished" and cell)

    with monkeypatch.context() as while_closing:
        while_closing.setattr(Record, "close", interrupted)
        assert study(*SEED)[0] == 130
    assert states(runs()) == ["FINISHED", "KILLED"]
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "FAIL"]
    assert states(runs(parents=True)) == ["KILLED"]
    assert study(*SEED)[0] == 0
    assert [name for name, _ in fake.ran] == ["lora", "sinc", "fourier"]


def test_a_signal_while_the_report_is_recorded_leaves_the_invocation_finished(home, fake, study, runs, monkeypatch):
    end = Record.end

    def interrupted(self, *arguments):
        end(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as while_ending:
        while_ending.setattr(Record, "end", interrupted)
        assert study(*SEED)[0] == 130
    assert states(runs(parents=True)) == ["FINISHED"]
    assert states(runs()) == ["FINISHED"] * 3


def test_a_cell_that_optuna_cannot_be_told_of_stays_finished(home, fake, study, runs, trials, monkeypatch):
    from optuna.exceptions import StorageInternalError

    def full(*_, **__):
        raise StorageInternalError("full")

    with monkeypatch.context() as disk:
        disk.setattr(Trials, "tell", full)
        assert study(*SEED)[0] == 1
    assert states(runs())[0] == "FINISHED"
    assert study(*SEED)[0] == 0
    assert "RUNNING" not in {trial.state.name for trial in trials()}
    assert [name for name, _ in fake.ran].count("lora") == 1


def test_a_hanging_store_is_left_at_the_next_signal(home, fake, study, runs, monkeypatch):
    def hangs(*_, **__):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    with monkeypatch.context() as hanging:
        hanging.setattr(Record, "finish", hangs)
        assert study(*SEED)[0] == 130
    assert set(states(runs())) == {"KILLED"}


def test_ctrl_c_ends_an_import_after_a_result(home, fake, study, runs, monkeypatch):
    from test_bad_content import results_of

    results_of(fake, study, SEED)
    finish = Record.finish

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        finish(self, *arguments, **options)

    with monkeypatch.context() as while_finishing:
        while_finishing.setattr(Record, "finish", interrupted)
        assert study(*SEED, "--import", "results.jsonl")[0] == 130
    assert states(runs()) == ["FINISHED"]
    assert states(runs(parents=True)) == ["KILLED"]
    assert study(*SEED, "--import", "results.jsonl")[0] == 0
    assert states(runs()) == ["FINISHED"] * 3


@pytest.mark.parametrize("moment", ["report_files", "report_on"])
@pytest.mark.parametrize("way", ["run", "import"])
def test_ctrl_c_while_no_cell_runs_ends_a_call_at_once(home, fake, study, runs, monkeypatch, moment, way):
    from test_bad_content import results_of

    from basisadapt.study.drive import engine, exchange, invocation

    results_of(fake, study, SEED)
    module = invocation if moment == "report_files" else exchange if way == "import" else engine
    make = getattr(module, moment)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return make(*arguments)

    command = (*SEED, *(("--import", "results.jsonl") if way == "import" else ()))
    with monkeypatch.context() as while_reporting:
        while_reporting.setattr(module, moment, interrupted)
        assert study(*command)[0] == 130
    assert states(runs()) == ["FINISHED"] * 3
    assert states(runs(parents=True)) == ["KILLED"]
    assert study(*command)[0] == 0


def test_an_import_that_fails_leaves_nothing_at_work(home, fake, study, runs, monkeypatch):
    from test_bad_content import results_of

    results_of(fake, study, SEED)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Record, "finish", full)
        assert study(*SEED, "--import", "results.jsonl")[0] == 1
    assert states(runs()) == ["KILLED"]


def test_a_start_that_is_interrupted_leaves_nothing_at_work(home, fake, study, runs, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as while_starting:
        while_starting.setattr(Record, "_describe", interrupted, raising=False)
        assert study(*SEED)[0] == 130
    assert states(runs()) == ["KILLED"]
    assert not Path("hanging").exists()
