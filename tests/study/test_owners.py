"""Who has a cell: claims, heartbeats, and what becomes of the cells of a driver that is dead."""

from __future__ import annotations

import collections
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from common import ALL, states, table_of
from forked import Forked

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.record import Record
from basisadapt.study.record.runs import SILENCE


@pytest.fixture
def spec(home):
    return read_spec("tiny.yaml")


@pytest.fixture
def cell(spec):
    return resolve(spec, seeds=[1]).cells[0]


@pytest.fixture
def record(home):
    return Record("sqlite:///mlflow.db", "tiny")


@pytest.fixture
def other():
    """Another process, alive until `communicate`; its `owner`."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.owner = Owner.of(process.pid)
    yield process
    process.communicate()


@contextmanager
def acting_as(owner):
    """Within, this process is another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Owner, "me", lambda: owner)
        yield


def test_the_cells_of_a_live_process_are_left_alone_and_awaited(
    fake, study, runs, monkeypatch, spec, cell, record, other
):
    from basisadapt.study.drive import loop

    with acting_as(other.owner):
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


def test_of_two_processes_that_start_a_cell_the_later_gives_way(spec, cell, record, other):
    parent = record.begin(spec, {})
    with acting_as(other.owner):
        first = record.start(parent, cell)
    assert record.start(parent, cell) is None
    assert record.outcomes()[cell.key].run_id == first
    other.communicate()
    assert record.start(parent, cell) is not None


def test_a_cell_whose_process_dies_while_it_is_awaited_is_run(fake, study, runs, monkeypatch, spec, record, other):
    from basisadapt.study.drive import loop

    with acting_as(other.owner):
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
    home, fake, faking, study, runs, trials, empty_databases, tmp_path_factory
):
    import shutil
    import time

    options = faking({("fourier", 2): "hang"})
    driver = Forked([sys.executable, "-m", "basisadapt.study", "tiny.yaml", *options], stderr=subprocess.PIPE)
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


def test_a_dead_drivers_trial_gets_no_value_that_another_run_has_found(home, fake, study, trials):
    from basisadapt.study.record.trials import Trials

    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    cell = resolve(read_spec("tiny.yaml"), seeds=[1]).cells[0]
    Trials("sqlite:///optuna.db", "tiny").ask(cell, "a run that was closed")
    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    states = collections.Counter((trial.user_attrs["cell"] == cell.key, trial.state.name) for trial in trials())
    assert states == {(True, "COMPLETE"): 1, (True, "FAIL"): 1, (False, "COMPLETE"): 2}


def test_of_claims_made_at_once_one_stays(monkeypatch, spec, cell, record, other):
    """In every order in which two drivers can write their runs and look at the other's."""
    from basisadapt.study.record import record as module

    parent = record.begin(spec, {})
    create = record._client.create_run

    def run_of_the_other(start_time, claimed=False):
        tags = {"mlflow.parentRunId": parent, "basisadapt.cell": cell.key, "basisadapt.owner": str(other.owner)}
        tags |= {"basisadapt.claimed": "true"} if claimed else {}
        return create(record.experiment_id, start_time=start_time, tags=tags).info.run_id

    # A run that started earlier by its clock, but was written after this one had looked and claimed the cell.
    run_id = record.start(parent, cell)
    assert run_id is not None
    with acting_as(other.owner):
        late = record._client.get_run(run_of_the_other(start_time=1))
        assert not record._claim(late, cell)
    record.close(late.info.run_id, "killed")
    record.close(run_id, "killed")

    # A later run that is not claimed yet is waited for: it may have looked before this one was there.
    future = int(time.time() * 1000) + 60_000
    waits = []

    def then_it_claims(_):
        waits.append(record._client.set_tag(rival, "basisadapt.claimed", "true"))

    created = []

    def create_both(*arguments, **options):
        created.append(create(*arguments, **options))
        return created[-1]

    with monkeypatch.context() as at_once:
        at_once.setattr(module.time, "sleep", then_it_claims)
        at_once.setattr(record._client, "create_run", create_both)
        at_once.setattr(record.runs, "of", lambda cell, look=record.runs.of: [] if not created else look(cell))
        rival = run_of_the_other(start_time=future)
        assert record.start(parent, cell) is None
    assert len(waits) == 1

    # One that neither claims it nor ends, as it was suspended: that is said, once, and then it has the cell.
    record._client.delete_tag(rival, "basisadapt.claimed")
    said = []
    with monkeypatch.context() as suspended:
        suspended.setattr(module, "NOTICED", 0.0)
        suspended.setattr(module, "UNDECIDED", 0.3)
        assert record.start(parent, cell, lambda: said.append("waiting")) is None
    assert said == ["waiting"]


def test_a_driver_on_another_host_is_dead_when_it_is_silent(monkeypatch, spec, cell, record):
    with acting_as(Owner("another-host", 1, "1")):
        run_id = record.start(record.begin(spec, {}), cell)
    assert record.outcomes()[cell.key].busy
    assert record.start(record.begin(spec, {}), cell) is None
    later = time.monotonic() + SILENCE - 1
    with monkeypatch.context() as then:
        then.setattr(time, "monotonic", lambda: later)
        record.beat([run_id])
        assert run_id in record.close_orphans()
        later += SILENCE - 1
        assert run_id in record.close_orphans()
        assert record.outcomes()[cell.key].busy
        later += 2
        assert run_id not in record.close_orphans()
    assert record.outcomes()[cell.key].status == "killed"


@pytest.mark.parametrize("skew", [-600, 600])
def test_the_clock_of_another_host_may_be_wrong(fake, monkeypatch, skew, spec, cell, record):
    now = time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Owner, "me", lambda: Owner("another-host", 1, "1"))
        elsewhere.setattr(time, "time", lambda: now() + skew)
        run_id = record.start(record.begin(spec, {}), cell)
        record.beat([run_id])
    assert run_id in record.close_orphans()
    assert record.outcomes()[cell.key].busy
    assert record.start(record.begin(spec, {}), cell) is None


def test_both_stores_take_a_driver_elsewhere_for_dead_at_once(fake, study, runs, trials, monkeypatch, spec, record):
    from basisadapt.study.record import runs as module
    from basisadapt.study.record.trials import Trials

    cells = resolve(spec, seeds=[1, 2]).cells
    with acting_as(Owner("another-host", 1, "1")):
        parent = record.begin(spec, {})
        for cell in cells[:2]:
            Trials("sqlite:///optuna.db", "tiny").ask(cell, record.start(parent, cell))
    monkeypatch.setattr(module, "SILENCE", 0.0)
    assert study("tiny.yaml", "--seeds", "1,2")[0] == 0
    assert [trial.state.name for trial in trials()] == ["FAIL"] * 2 + ["COMPLETE"] * 6
    assert sorted(run.info.status for run in runs()) == ["FINISHED"] * 6 + ["KILLED"] * 2
    assert sorted(run.info.status for run in runs(parents=True)) == ["FINISHED", "KILLED"]


def test_a_driver_that_was_taken_for_dead_gives_its_cell_up(home, fake, study, runs, trials):
    """It was suspended; the other one has finished the cell in the meantime, or was killed too."""
    other = Record("sqlite:///mlflow.db", "tiny")

    def score(config):
        if fake.ran in ([("lora", 1)], [("lora", 1), ("sinc", 1)]):
            record = Record("sqlite:///mlflow.db", "tiny")
            (key,) = [key for key, outcome in record.outcomes().items() if outcome.status == "running"]
            record.cut_off(record.outcomes()[key].run_id, "")
        return 0.5

    fake.score = score
    code, _, err = study("tiny.yaml", "--seeds", "1")
    assert code == 0
    assert "LoRA, seed 1: another process took this one for dead and has the cell now" in err
    assert collections.Counter(name for name, _ in fake.ran) == {"lora": 2, "sinc": 2, "fourier": 1}
    assert sorted(run.info.status for run in runs()) == ["FINISHED"] * 3 + ["KILLED"] * 2
    assert sorted(trial.state.name for trial in trials()) == ["COMPLETE"] * 3 + ["FAIL"] * 2
    assert other.experiment_id is None


def test_a_rival_that_was_suspended_before_its_claim_is_not_waited_for(monkeypatch, spec, cell, record):
    from basisadapt.study.record import record as module

    monkeypatch.setattr(module, "UNDECIDED", 0.2)
    parent = record.begin(spec, {})
    tags = {"basisadapt.cell": cell.key, "basisadapt.owner": str(Owner("another-host", 1, "1"))}
    rival = record._client.create_run(record.experiment_id, start_time=int(time.time() * 1000) + 60_000, tags=tags)
    assert record.start(parent, cell) is None
    record.close(rival.info.run_id, "killed")
    assert record.start(parent, cell) is not None


def test_a_process_number_means_something_in_its_own_namespace_and_boot_alone(monkeypatch):
    from basisadapt.study.record import owner

    name, machine, namespace, boot = "host", "machine", "pid:[1]", "boot"
    monkeypatch.setattr(owner, "here", lambda: "/".join([name, machine, namespace, boot]))
    me = Owner.me()
    assert (me.is_here, me.is_dead) == (True, False)
    elsewhere = {
        "another container": ("host", machine, "pid:[2]", boot),
        "another machine of this name": ("host", "other", namespace, "other"),
        "a machine without a number": ("host", "", namespace, "other"),
    }
    for place in elsewhere.values():
        other = Owner("/".join(place), me.pid, me.started + "1")
        assert (other.is_here, other.is_dead) == (False, False), place
    before = Owner("/".join([name, machine, namespace, "earlier"]), me.pid, me.started)
    assert (before.is_here, before.is_dead) == (False, True)


def test_where_this_process_is():
    from basisadapt.study.record.owner import here

    if not Path("/proc/self/ns/pid").exists():
        pytest.skip("needs Linux")
    assert here().split("/")[0] == socket.gethostname()
    assert here().split("/")[2].startswith("pid:[")
    assert Owner.parse(str(Owner.me())) == Owner.me()
