"""What a study does where its record cannot be read or written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAKES = str(Path(__file__).with_name("fakes.py"))
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture
def mounted(home):
    """Runs a shell script where it may mount file systems that nobody else sees."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs a mount namespace, which this machine does not let us have")

    def run(script):
        environment = {**os.environ, "STUDY": f"{sys.executable} {FAKES} none 0"}
        done = subprocess.run(
            [*NAMESPACE, "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_a_full_disk_stops_the_study_and_the_record_stays_readable(home, mounted):
    size = sum((home / name).stat().st_size for name in ("mlflow.db", "optuna.db")) + 700_000
    out, err = mounted(f"""
        mkdir disk && mount -t tmpfs -o size={size} none disk && cp *.db tiny.yaml disk && cd disk
        $STUDY tiny.yaml; echo "exit code $?"
        $STUDY --report tiny.yaml 2>&1
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
        mkdir disk && mount -t tmpfs -o size=8k none disk && cp tiny.yaml disk && cd disk
        $STUDY tiny.yaml; test $? = 2
    """)
    assert err.count("\n") == 1
    assert err.startswith("basisadapt: error: --")


def test_a_read_only_folder_is_bad_input_and_its_record_can_be_reported(home, fake, study, mounted):
    study("tiny.yaml", "--seeds", "1")
    _, expected, _ = study("--report", "tiny.yaml", "--seeds", "1")
    out, err = mounted("""
        mount --bind . . && mount -o remount,bind,ro . && cd .
        cd "$PWD"
        $STUDY tiny.yaml --seeds 2; test $? = 2 || exit 1
        $STUDY --report tiny.yaml --seeds 1
    """)
    assert err == ("basisadapt: error: --tracking-uri 'sqlite:///mlflow.db' cannot be written: Read-only file system\n")
    assert out.split("\nRecorded")[0] == expected.split("\nRecorded")[0]


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
