"""Several drivers on one record, and a study that survives whatever is killed."""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from common import STUDY, check_whole, eventually, table_of


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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
