"""Several drivers on one record, cells on a Ray cluster, and a study that survives whatever is killed."""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from basisadapt.study.plan.spec import read_spec
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.record import Record
from basisadapt.study.record.runs import SILENCE

SEEDS = ("--seeds", "1,2,3,4,5,6,7,8")  # with three rows, 24 cells
STUDY = [sys.executable, "-m", "basisadapt.study", "tiny.yaml", *SEEDS]


def table_of(out):
    return out.split("\nRecorded in")[0]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def eventually(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Server:
    """MLflow's, over a sqlite file in a folder of its own; it may be killed and started again."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        stores += ["--artifacts-destination", f"{self.folder}/files"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(
            [*command, "--workers", "1", *stores], env=environment, start_new_session=True, **quiet
        )
        eventually(self._answers)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self):
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
            return answer.status == 200


@pytest.fixture
def server(empty_databases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_databases / "mlflow.db", folder)
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def postgres():
    """The URL of a database of PostgreSQL, started for the test."""
    pytest.importorskip("psycopg", reason="needs the extra `postgres`")
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ["PATH"].split(os.pathsep))]
    programs = next((place for place in sorted(places, reverse=True) if (place / "initdb").exists()), None)
    if programs is None:
        pytest.skip("needs the programs of PostgreSQL")
    folder, port = Path(tempfile.mkdtemp()), free_port()
    as_user = {"user": "nobody"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root
    if as_user:
        shutil.chown(folder, "nobody")
    common = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **as_user}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "test", "--auth=trust"], **common)
    control = [programs / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off", "start"], **common)
    yield f"postgresql+psycopg://test@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **common)
    shutil.rmtree(folder)


@contextmanager
def driver(*arguments):
    """A study's process, whose words go to a file."""
    said = Path(tempfile.mkstemp(dir=".")[1])
    with said.open("w") as file:
        process = subprocess.Popen([*STUDY, *arguments], stdout=subprocess.PIPE, stderr=file, encoding="utf-8")
    process.said = said
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def workers_of(process):
    """The children of a driver that run cells; none of a driver that is gone."""
    workers = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):  # a zombie's error too
                workers += [child] if "basisadapt.training" in child.cmdline() else []
    return workers


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


@pytest.fixture
def undisturbed(home, fake, study, empty_databases, tmp_path_factory):
    """The table of the 24 cells as one driver makes it that nothing happens to, and the cells' keys."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(empty_databases / "mlflow.db", folder)
    uri = f"sqlite:///{folder}/mlflow.db"
    _, out, _ = study("tiny.yaml", *SEEDS, "--tracking-uri", uri)
    return table_of(out), list(Record(uri, "tiny").outcomes())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_drivers_on_postgresql_and_a_server_share_the_work(home, faking, server, postgres, undisturbed):
    table, cells = undisturbed
    place = ("--tracking-uri", server.uri, "--storage", postgres)
    seconds = {}
    for count in (1, 2):
        plugin = faking(seconds=4.0)
        spec = (home / "tiny.yaml").read_text()
        name = f"by_{count}.yaml"
        (home / name).write_text(spec)
        commands = [[name if part == "tiny.yaml" else part for part in STUDY] for _ in range(count)]
        drivers = [
            subprocess.Popen([*command, *place, *plugin], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        said = [process.communicate() for process in drivers]
        assert [process.returncode for process in drivers] == [0] * count, said
        assert {table_of(out) for out, _ in said} == {table}
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=server.uri)
        experiment = client.get_experiment_by_name(f"by_{count}")
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        ended = [
            run for run in runs if run.data.tags.get("status") == "finished" and "basisadapt.cell" in run.data.tags
        ]
        assert len(ended) == len({run.data.tags["basisadapt.cell"] for run in ended}) == len(cells)
        assert len({run.data.tags["basisadapt.owner"] for run in ended}) == count
        seconds[count] = (max(run.info.end_time for run in ended) - min(run.info.start_time for run in ended)) / 1000
    print(f"24 cells of 4 s: {seconds[1]:.1f} s by one driver, {seconds[2]:.1f} s by two")
    assert seconds[2] < 1.25 * seconds[1] / 2


HOST_AND_CLOCK = """
import os
import socket
import time

if host := os.environ.get("TEST_HOST"):
    now, nanoseconds, ahead = time.time, time.time_ns, int(os.environ["TEST_CLOCK"])
    socket.gethostname = lambda: host
    time.time = lambda: now() + ahead
    time.time_ns = lambda: nanoseconds() + ahead * 10**9
"""
SILENT = 45.0  # seconds, instead of the SILENCE of minutes
IMPATIENT = f"""
from basisadapt.study.record import heartbeat, runs

heartbeat.BEAT, runs.SILENCE = 3.0, {SILENT}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hosts_with_clocks_ten_minutes_apart_one_suspended_one_killed(
    home, faking, server, postgres, undisturbed, monkeypatch
):
    import mlflow

    table, cells = undisturbed
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(HOST_AND_CLOCK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home / "site"), os.environ.get("PYTHONPATH", "")]))
    place = [*faking(seconds=6.0), "--tracking-uri", server.uri, "--storage", postgres]
    with (home / "faking.py").open("a") as plugin:
        plugin.write(IMPATIENT)
    client = mlflow.MlflowClient(tracking_uri=server.uri)

    def runs(host, *states):
        """The cells' runs that a host has, or had, in such a state."""
        experiment = client.get_experiment_by_name("tiny")
        found = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
        cells_runs = [run for run in found if "basisadapt.cell" in run.data.tags]
        return [r for r in cells_runs if r.data.tags["basisadapt.owner"].startswith(host) and r.info.status in states]

    def on(host, ahead):
        monkeypatch.setenv("TEST_HOST", host)
        monkeypatch.setenv("TEST_CLOCK", str(ahead))
        return driver(*place)

    with on("early", -300) as early, on("late", 300) as late:
        eventually(lambda: runs("early", "FINISHED") and runs("late", "FINISHED"))
        times = [runs(host, "FINISHED")[0].info.end_time / 1000 - time.time() for host in ("early", "late")]
        assert times[1] - times[0] > 500
        # One is suspended in the middle of a cell, until the other one has waited for it and takes the cell over.
        eventually(lambda: runs("early", "RUNNING"))
        early.send_signal(signal.SIGSTOP)
        (lost,) = runs("early", "RUNNING")
        eventually(lambda: runs("late", "RUNNING") and runs("early", "KILLED"), 900)
        assert client.get_run(lost.info.run_id).info.status == "KILLED"
        # In the middle of that the other one is killed, which leaves the first to wait for it and to end the study.
        late.kill()
        early.send_signal(signal.SIGCONT)
        out, _ = early.communicate()
        assert early.returncode == 0, early.said.read_text()
    assert table_of(out) == table
    assert len(runs("late", "KILLED")) == 1
    with on("late", 300) as again:
        out, _ = again.communicate()
        assert again.returncode == 0, again.said.read_text()
    assert table_of(out) == table
    ends = check_whole(server.uri, postgres, cells)
    print(f"24 cells by two hosts, clocks {times[1] - times[0]:.0f} s apart; runs at the end: {dict(ends)}")


def test_a_dead_drivers_trial_gets_no_value_that_another_run_has_found(home, fake, study, trials):
    from basisadapt.study.plan.cells import resolve
    from basisadapt.study.record.trials import Trials

    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    cell = resolve(read_spec("tiny.yaml"), seeds=[1]).cells[0]
    Trials("sqlite:///optuna.db", "tiny").ask(cell, "a run that was closed")
    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    states = collections.Counter((trial.user_attrs["cell"] == cell.key, trial.state.name) for trial in trials())
    assert states == {(True, "COMPLETE"): 1, (True, "FAIL"): 1, (False, "COMPLETE"): 2}


def test_of_claims_made_at_once_one_stays(home, monkeypatch):
    """In every order in which two drivers can write their runs and look at the other's."""
    from basisadapt.study.plan.cells import resolve
    from basisadapt.study.record import record as module

    spec = read_spec("tiny.yaml")
    cell = resolve(spec, seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
    parent = record.begin(spec, {})
    helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        other = Owner.of(helper.pid)
        create = record._client.create_run

        def run_of_the_other(start_time, claimed=False):
            tags = {"mlflow.parentRunId": parent, "basisadapt.cell": cell.key, "basisadapt.owner": str(other)}
            tags |= {"basisadapt.claimed": "true"} if claimed else {}
            return create(record.experiment_id, start_time=start_time, tags=tags).info.run_id

        # A run that started earlier by its clock, but was written after this one had looked and claimed the cell.
        run_id = record.start(parent, cell)
        assert run_id is not None
        with monkeypatch.context() as as_other:
            as_other.setattr(Owner, "me", lambda: other)
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
    finally:
        helper.communicate()


def test_a_driver_on_another_host_is_dead_when_it_is_silent(home, monkeypatch):
    from basisadapt.study.plan.cells import resolve

    spec = read_spec("tiny.yaml")
    cell = resolve(spec, seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Owner, "me", lambda: Owner("another-host", 1, "1"))
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
def test_the_clock_of_another_host_may_be_wrong(home, fake, monkeypatch, skew):
    from basisadapt.study.plan.cells import resolve

    spec = read_spec("tiny.yaml")
    cell = resolve(spec, seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
    now = time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Owner, "me", lambda: Owner("another-host", 1, "1"))
        elsewhere.setattr(time, "time", lambda: now() + skew)
        run_id = record.start(record.begin(spec, {}), cell)
        record.beat([run_id])
    assert run_id in record.close_orphans()
    assert record.outcomes()[cell.key].busy
    assert record.start(record.begin(spec, {}), cell) is None


def test_both_stores_take_a_driver_elsewhere_for_dead_at_once(home, fake, study, runs, trials, monkeypatch):
    from basisadapt.study.plan.cells import resolve
    from basisadapt.study.record import runs as module
    from basisadapt.study.record.trials import Trials

    spec = read_spec("tiny.yaml")
    record = Record("sqlite:///mlflow.db", "tiny")
    cells = resolve(spec, seeds=[1, 2]).cells
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Owner, "me", lambda: Owner("another-host", 1, "1"))
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


def test_a_rival_that_was_suspended_before_its_claim_is_not_waited_for(home, monkeypatch):
    from basisadapt.study.plan.cells import resolve
    from basisadapt.study.record import record as module

    monkeypatch.setattr(module, "UNDECIDED", 0.2)
    spec = read_spec("tiny.yaml")
    cell = resolve(spec, seeds=[1]).cells[0]
    record = Record("sqlite:///mlflow.db", "tiny")
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


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_is_killed_at_whatever_moment_the_table_is_the_same(home, faking, server, undisturbed):
    """20 kills with -9 of driver, worker and server, at moments drawn from a fixed seed."""
    table, cells = undisturbed
    # Cells so long that 24 outlast 20 kills, and moments from before a driver has begun to when its cells end.
    place = (*faking(seconds=5.0), "--workers", "2", "--tracking-uri", server.uri)
    draw, tally, drivers = random.Random(0), collections.Counter(), 0
    while tally.total() < 20:
        drivers += 1
        with driver(*place) as process:
            while tally.total() < 20:
                time.sleep(draw.uniform(0.0, 10.0))
                victim = draw.choice(["driver", "worker", "server"])
                workers = workers_of(process)
                code, said = process.poll(), process.said.read_text()
                refused = code == 2 and "cannot be opened" in said  # it began while there was no server
                assert code in (None, 1) or refused, said  # not through before the last kill
                if code is not None:
                    break
                if victim == "driver":
                    process.kill()
                elif victim == "server":
                    server.kill()
                    server.start()
                elif workers:
                    with suppress(psutil.NoSuchProcess):
                        draw.choice(workers).kill()
                else:
                    continue
                tally[victim] += 1
                if victim == "driver":
                    break
    with driver(*place) as process:
        out, _ = process.communicate()
        assert process.returncode == 0, process.said.read_text()
    assert table_of(out) == table
    ends = check_whole(server.uri, "sqlite:///optuna.db", cells)
    print(f"killed: {dict(tally)}, {drivers} drivers; runs at the end: {dict(ends)}")


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_cells_run_as_ray_tasks_plugins_travel_and_workers_may_die(home, faking, study, ray, undisturbed):
    table, cells = undisturbed
    draw, killed = random.Random(0), []

    def at_work():
        found = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [child] if child.cmdline()[:1] == ["ray::run_job"] else []
        return found

    def kill():
        while len(killed) < 5:
            eventually(at_work)
            time.sleep(draw.uniform(0.0, 2.0))
            for worker in at_work()[:1]:
                worker.kill()
                killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    code, out, err = study("tiny.yaml", *SEEDS, *faking(seconds=1.5), "--ray", "local")
    killer.join()
    assert (code, table_of(out)) == (0, table), err
    check_whole("sqlite:///mlflow.db", "sqlite:///optuna.db", cells)
    print(f"killed: {len(killed)} Ray workers")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_ray_node_is_killed_and_its_cells_run_elsewhere(home, faking, study, ray, undisturbed):
    from ray.cluster_utils import Cluster

    table, cells = undisturbed
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()

        def kill():
            eventually(
                lambda: len([o for o in Record("sqlite:///mlflow.db", "tiny").outcomes().values() if o.done]) > 7
            )
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        code, out, err = study("tiny.yaml", *SEEDS, *faking(seconds=2.0), "--ray", cluster.address)
        killer.join()
    finally:
        cluster.shutdown()
    assert (code, table_of(out)) == (0, table), err
    check_whole("sqlite:///mlflow.db", "sqlite:///optuna.db", cells)
    ran = collections.Counter(
        o.environment["ray_node"] for o in Record("sqlite:///mlflow.db", "tiny").outcomes().values()
    )
    print(f"cells by node: {dict(ran)}")
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray", "local", "--timeout", "5"], "--timeout does not go with --ray"),
        (["--ray", "local", "--workers", "2"], "--workers does not go with --ray"),
        (["--cpus-per-cell", "2"], "go with --ray"),
        (["--ray", "local", "--cpus-per-cell", "0"], "--cpus-per-cell must be above 0, got 0"),
        (["--ray", "local", "--gpus-per-cell", "-1"], "--gpus-per-cell must be at least 0, got -1"),
    ],
)
def test_bad_options_of_a_cluster(home, fake, study, arguments, message):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    code, _, err = study("tiny.yaml", *arguments)
    assert code == 2
    assert message in err
    assert fake.ran == []
