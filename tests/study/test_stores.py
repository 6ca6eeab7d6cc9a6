"""Databases: made whole or not at all, mended after a kill, found under any address, and where they are moved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

from basisadapt.core.errors import InputError
from basisadapt.study.record.record import Record
from basisadapt.study.record.stores import same_database, with_retries
from basisadapt.study.record.trials import Trials


def opened(kind):
    return Record("sqlite:///mlflow.db", "tiny") if kind == "mlflow" else Trials("sqlite:///optuna.db", "tiny")


def test_pictures_are_read_where_they_lie(home, fake, study, runs, monkeypatch):
    """MLflow's client would ask the database several times for each."""
    study("tiny.yaml", "--seeds", "1")
    pictures, run_id = Record("sqlite:///mlflow.db", "tiny").pictures, runs()[0].info.run_id
    names = [file.path for file in pictures._client.list_artifacts(run_id) if file.path.endswith(".png")]
    known = {name: pictures._file(run_id, name) for name in names}
    monkeypatch.setattr(pictures, "_file", None)
    assert pictures.of(run_id) == known != {}


def test_mlflows_own_variable_says_where_the_record_is(home, fake, study, monkeypatch):
    """Where no option does."""
    for name in ("mlflow.db", "optuna.db"):
        (home / "there").mkdir(exist_ok=True)
        (home / name).rename(home / "there" / name)
    there = f"sqlite:///{home}/there/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
    code, out, _ = study("tiny.yaml", "--seeds", "1")
    assert code == 0
    assert f"Recorded in {there}" in out
    assert not (home / "mlflow.db").exists()
    ran = len(fake.ran)
    assert study("tiny.yaml", "--seeds", "1", "--tracking-uri", there)[0] == 0
    assert len(fake.ran) == ran > 0, "the same record"
    assert study("--report", "tiny.yaml", "--seeds", "1", "--tracking-uri", "sqlite:///mlflow.db")[0] == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert "'sqlite:///mlflow.db'" in study("--report", "tiny.yaml", "--seeds", "1")[2]


STARTS = """
import sys
from test_stores import opened

sys.stdin.readline()
opened("mlflow")
opened("optuna")
"""
KILLED = """
import os, sys
import alembic.command
import optuna.storages._rdb.models as models
from test_stores import opened

upgrade = alembic.command.upgrade

def half(config, _):
    upgrade(config, "+10")
    os._exit(9)

alembic.command.upgrade = half
models.VersionInfoModel.find = lambda *_: os._exit(9)
opened(sys.argv[1])
"""
HALF_WRITTEN = """
import os, sqlite3, sys

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the end, which does not come
connection.execute("BEGIN")
connection.execute("CREATE TABLE half AS SELECT 1")
for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
    connection.execute(f"CREATE TABLE half_{table} AS SELECT * FROM {table}")
connection.execute("CREATE TABLE much AS SELECT randomblob(100000) FROM alembic_version")
os._exit(9)
"""


@pytest.mark.parametrize("kind", ["mlflow", "optuna"])
def test_a_first_start_that_is_killed_is_none(folder, kind):
    assert Forked([sys.executable, "-c", KILLED, kind]).wait() == 9
    assert not (folder / f"{kind}.db").exists()
    opened(kind)
    assert sorted(path.name for path in folder.iterdir()) == [f"{kind}.db", "tiny.yaml"]


def test_first_starts_at_once_make_one_database_each(folder):
    starts = [Forked([sys.executable, "-c", STARTS], stdin=subprocess.PIPE, text=True) for _ in range(2)]
    for start in starts:
        start.stdin.write("now\n")
        start.stdin.flush()
    for start in starts:
        start.communicate()
    assert [start.returncode for start in starts] == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "optuna.db", "tiny.yaml"]


def test_an_empty_file_is_a_missing_database(folder):
    (folder / "mlflow.db").touch()
    assert opened("mlflow").outcomes() == {}


def test_a_servers_tables_that_another_process_makes_are_awaited(monkeypatch):
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from basisadapt.study.record import stores

    monkeypatch.setattr(stores, "PAUSE", 0.0)
    tried = []

    def opening(error, times):
        tried.append(1)
        if len(tried) <= times:
            raise error("CREATE TABLE", {}, Exception("relation already exists"))
        return "open"

    assert with_retries("postgresql://host/db", lambda: opening(ProgrammingError, 3)) == "open"
    tried.clear()
    with pytest.raises(ProgrammingError):
        with_retries("postgresql://host/db", lambda: opening(ProgrammingError, 100))
    assert len(tried) == stores.ATTEMPTS
    tried.clear()
    with pytest.raises(OperationalError):  # a server that is not there is not waited for
        with_retries("postgresql://host/db", lambda: opening(OperationalError, 1))


@pytest.mark.parametrize("name", ["mlflow.db", "optuna.db"])
def test_what_a_kill_left_half_written_is_undone(home, fake, study, name):
    study("tiny.yaml", "--seeds", "1")
    _, expected, _ = study("--report", "tiny.yaml", "--seeds", "1")
    assert Forked([sys.executable, "-c", HALF_WRITTEN, name]).wait() == 9
    assert (home / f"{name}-journal").stat().st_size > 0
    code, out, err = study("--report", "tiny.yaml", "--seeds", "1")
    assert (code, err) == (0, "")
    assert out == expected
    assert study("tiny.yaml", "--seeds", "1")[0] == 0
    assert not (home / f"{name}-journal").exists()


# --- addresses ---


@pytest.mark.parametrize("address", ["sqlite:///./mlflow.db", "sqlite:///sqlite", "sqlite:///here%20there.db"])
def test_an_address_is_read_as_the_library_reads_it_that_opens_it(home, fake, study, address):
    from sqlalchemy.engine import make_url

    file = Path(make_url(address).database)
    os.replace("mlflow.db", file)
    assert study("tiny.yaml", "--seeds", "1", "--tracking-uri", address)[0] == 0
    assert study("--report", "tiny.yaml", "--seeds", "1", "--tracking-uri", address)[0] == 0
    assert sorted(os.listdir()) == sorted([file.name, "mlruns", "optuna.db", "tiny.yaml"])
    assert len(Record(f"sqlite:///{file}", "tiny").outcomes()) == 3


def test_a_folder_may_have_any_name(home, fake, study, monkeypatch):
    place = home / (name := "100% a%20b #1: what?")
    place.mkdir()
    for file in ("mlflow.db", "optuna.db", "tiny.yaml"):
        os.replace(file, place / file)
    monkeypatch.chdir(place)
    code, _, err = study("tiny.yaml", "--seeds", "1", "--output", "report")
    assert code == 0, err
    assert sorted(os.listdir()) == ["mlflow.db", "mlruns", "optuna.db", "report", "tiny.yaml"]
    assert os.listdir(home) == [name]
    assert (place / "report" / "report.html").read_text().count("<img ") > 3  # pictures of cells, read back


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x.db?uri=true"])
def test_an_address_without_a_file_is_refused(folder, study, address):
    for option in ("--tracking-uri", "--storage"):
        code, out, err = study("tiny.yaml", option, address)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "must name a file, as sqlite:///mlflow.db does" in err
    assert os.listdir() == ["tiny.yaml"]


def test_one_database_under_two_addresses_is_one(folder, study):
    assert same_database("sqlite:///a.db", "sqlite:///./a.db")
    assert not same_database("sqlite:///a.db", "postgresql://host/a.db")
    code, _, err = study("tiny.yaml", "--storage", "sqlite:///./mlflow.db")
    assert code == 2
    assert "cannot share one database" in err


def test_a_folder_that_was_moved_keeps_its_files_and_gets_the_new_ones(
    home, fake, study, monkeypatch, tmp_path_factory
):
    study("tiny.yaml", "--seeds", "1", "--output", "report")
    page = (home / "report" / "report.html").read_text()
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    os.rename(home, moved)
    monkeypatch.chdir(moved)
    assert study("--report", "tiny.yaml", "--seeds", "1", "--output", "report")[0] == 0
    pictures = (moved / "report" / "report.html").read_text().count("<img ")
    assert pictures == page.count("<img ") > 3
    assert study("tiny.yaml", "--seeds", "1,2")[0] == 0
    assert not home.exists()
    kept = list((moved / "mlruns" / "tiny").glob("*/artifacts/result.json"))
    assert len(kept) == 6


def test_a_database_that_was_moved_alone_leaves_its_files_where_they_are(
    home, fake, study, monkeypatch, tmp_path_factory
):
    study("tiny.yaml", "--seeds", "1")
    moved = tmp_path_factory.mktemp("elsewhere")
    for file in ("mlflow.db", "optuna.db", "tiny.yaml"):
        os.replace(file, moved / file)
    monkeypatch.chdir(moved)
    assert study("--report", "tiny.yaml", "--seeds", "1", "--output", "report")[0] == 0
    assert (moved / "report" / "report.html").read_text().count("<img ") > 3


def test_what_makes_a_database_may_fail(folder, monkeypatch):
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SqlAlchemyStore, "__init__", full)
    with pytest.raises(InputError, match="cannot be opened: No space left on device"):
        opened("mlflow")
    assert not (folder / "mlflow.db").exists()
