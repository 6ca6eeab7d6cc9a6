"""What a study does where its record cannot be read or written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest
from forked import Forked

# Makes the process root of name spaces of its own, in which it may mount file systems that nobody else sees.
ENTER = """
import ctypes, os, subprocess, sys
import fakes, forked, quick

USER, MOUNT = 0x10000000, 0x20000  # CLONE_NEWUSER and CLONE_NEWNS
user, group = os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(USER | MOUNT):
    sys.exit(77)
for name, text in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)

def shell(script):
    subprocess.run(["sh", "-e", "-c", script], check=True)

def study(*arguments, out=1, err=2):
    # A fork of this process, which has one thread: those of the server see other file systems.
    if (child := os.fork()) == 0:
        try:
            code = forked.be((0, out, err), ["python", "-m", "basisadapt.study", *arguments], ".", dict(os.environ))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

fakes.Fakes().install()
shell("mount --make-rprivate /")
"""


def forked(text):
    program = Forked([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = program.communicate(timeout=500)
    return program.returncode, out, err


@pytest.fixture
def mounted(home, fake):
    """Runs a program where it may mount file systems: its stdout and stderr."""
    if not sys.platform.startswith("linux") or forked(ENTER)[0] != 0:
        pytest.skip("needs a mount namespace, which this machine does not let us have")

    def run(text):
        code, out, err = forked(ENTER + textwrap.dedent(text))
        assert code == 0, err
        return out, err

    return run


def test_a_full_disk_stops_the_study_and_the_record_stays_readable(home, drawn, mounted):
    size = sum((home / name).stat().st_size for name in ("mlflow.db", "optuna.db")) + 700_000
    out, err = mounted(f"""
        shell("mkdir disk && mount -t tmpfs -o size={size} none disk && cp *.db tiny.yaml disk")
        os.chdir("disk")
        quick.put(quick.DRAWN)
        print("exit code", study("tiny.yaml"), flush=True)
        study("--report", "tiny.yaml", err=1)  # which may fail, for what was not run
    """)
    assert out.startswith("exit code 1\n")
    assert "\nLoRA " in out.partition("exit code 1")[2], "the report on what is recorded"
    assert "Traceback" not in err
    *before, line = err.splitlines()
    assert all(said.startswith("[") for said in before)
    assert line.startswith("basisadapt: error: the record cannot be read or written any more: ")
    assert "disk" in line or "space" in line
    assert "The record is kept; to resume: python -m basisadapt.study tiny.yaml" in line
    assert 1 <= len(before) < 9


def test_a_full_disk_before_the_work_is_bad_input(home, mounted):
    _, err = mounted("""
        shell("mkdir disk && mount -t tmpfs -o size=8k none disk && cp tiny.yaml disk")
        os.chdir("disk")
        assert study("tiny.yaml") == 2
    """)
    assert err.count("\n") == 1
    assert err.startswith("basisadapt: error: --")


def test_a_read_only_folder_is_bad_input_and_its_record_can_be_reported(home, mounted):
    out, err = mounted("""
        unheard = os.open(os.devnull, os.O_WRONLY)
        assert study("tiny.yaml", "--seeds", "1", out=unheard, err=unheard) == 0
        assert study("--report", "tiny.yaml", "--seeds", "1") == 0
        print("read-only", flush=True)
        shell("mount --bind . . && mount -o remount,bind,ro .")
        os.chdir(os.getcwd())
        assert study("tiny.yaml", "--seeds", "2") == 2
        assert study("--report", "tiny.yaml", "--seeds", "1") == 0
    """)
    assert err == ("basisadapt: error: --tracking-uri 'sqlite:///mlflow.db' cannot be written: Read-only file system\n")
    expected, found = (report.split("\nRecorded")[0] for report in out.split("read-only\n"))
    assert found == expected != ""


def test_a_folder_of_artifacts_that_cannot_be_written_is_bad_input(home, fake, study):
    (home / "mlruns").touch()
    code, out, err = study("tiny.yaml", "--seeds", "1")
    assert (code, out, err.count("\n"), fake.ran) == (2, "", 1, [])
    assert "mlruns', where the files of runs go, cannot be written" in err


@pytest.mark.parametrize("name", ["mlflow.db", "optuna.db"])
def test_a_damaged_database_is_bad_input_and_stays_as_it_is(home, fake, study, name):
    study("tiny.yaml", "--seeds", "1")
    path = home / name
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 3 * 4096):
        content[page : page + 100] = b"x" * 100
    path.write_bytes(content)
    option = {"mlflow.db": "--tracking-uri", "optuna.db": "--storage"}[name]
    code, out, err = study("tiny.yaml", "--seeds", "1,2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{option} 'sqlite:///{name}' cannot be read: " in err
    if name == "mlflow.db":
        assert study("--report", "tiny.yaml")[0] == 2
    assert path.read_bytes() == content


def test_a_record_that_fails_while_cells_run_ends_the_study_in_one_line(home, fake, study, runs, monkeypatch):
    from basisadapt.study.record.record import Record

    def full(*_, **__):
        raise OSError(28, "No space left on device", "/somewhere")

    with monkeypatch.context() as disk:
        disk.setattr(Record, "finish", full)
        code, _, err = study("tiny.yaml", "--seeds", "1")
    assert code == 1
    assert err.splitlines()[-1] == (
        "basisadapt: error: the record cannot be read or written any more: No space left on device: '/somewhere'. "
        "The record is kept; to resume: python -m basisadapt.study tiny.yaml --seeds 1"
    )
    assert len(fake.ran) == 1
    assert {run.data.tags["status"] for run in runs()} == {"killed"}  # the next cell's too, which had its run already
    assert study("tiny.yaml", "--seeds", "1")[0] == 0


def test_a_store_that_has_failed_is_not_waited_for_as_long_again(home, fake, study, monkeypatch):
    """A server that is gone: its first request is sent again for minutes, those that close what is open are not."""
    from basisadapt.study.record.record import Record

    retries, name = [], "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.delenv(name, raising=False)

    def gone(*_, **__):
        retries.append(os.environ.get(name))
        raise ConnectionError("no server")

    for request in ("finish", "cut_off", "close"):
        monkeypatch.setattr(Record, request, gone)
    code, _, err = study("tiny.yaml", "--seeds", "1")
    assert (code, "the record cannot be read or written any more: ConnectionError: no server" in err) == (1, True)
    assert retries == [None, "2", "2"]
    assert name not in os.environ


def test_a_heartbeat_that_a_lost_server_holds_up_is_not_waited_for(monkeypatch):
    from basisadapt.study.record import heartbeat

    beating, never = threading.Event(), threading.Event()

    def beat(_):
        beating.set()
        never.wait()

    monkeypatch.setattr(heartbeat, "BEAT", 0.0)
    monkeypatch.setattr(heartbeat, "STOP_SECONDS", 0.01)
    hanging = heartbeat.Heartbeat(SimpleNamespace(beat=beat), list)
    hanging.start()
    assert beating.wait(60)
    hanging.stop()
    assert hanging._thread.is_alive()
    never.set()
    hanging._thread.join(60)
    assert not hanging._thread.is_alive()
