"""Where records lie: sqlite files, made whole and looked at first; and what goes wrong with any store."""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from basisadapt.core.errors import InputError, RecordError, one_line

T = TypeVar("T")

FILES = "mlruns"  # the folder of the runs' files, beside a sqlite database
ATTEMPTS, PAUSE = 5, 2.0  # at a database in which another process makes the tables, seconds apart


def sqlite_file(url: str) -> Path | None:
    """The file behind a sqlite URL; None for other databases. Raises InputError for a URL that names no file."""
    if not url.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(url).database
    except ArgumentError:
        return None  # who opens it says what is wrong
    if not database or database.startswith((":memory:", "file:")):
        raise InputError(f"{url!r} must name a file, as sqlite:///mlflow.db does")
    return Path(database)


def sqlite_url(like: str, path: Path) -> str:
    """The URL `like`, of another file."""
    from sqlalchemy.engine import make_url

    return make_url(like).set(database=str(path)).render_as_string(hide_password=False)


def same_database(one: str, other: str) -> bool:
    """Whether two URLs are of one database."""
    files = [sqlite_file(url) for url in (one, other)]
    return one == other if None in files else len({path.resolve() for path in files if path is not None}) == 1


def check_database(url: str, option: str) -> None:
    """Raise InputError unless a sqlite database is sound and can be written, or made. Leaves nothing behind."""
    path = sqlite_file(url)
    if path is None:
        return
    check_sound(url, option)
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):  # where its journal goes
            pass
        if path.exists():
            with _connection(path) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option} {url!r} cannot be written: {reason}") from error


def check_sound(url: str, option: str) -> None:
    """Raise InputError if a sqlite database is damaged, or no database. What a kill left half written is undone."""
    path = sqlite_file(url)
    if path is None or not path.exists():
        return
    try:
        with _connection(path) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise InputError(f"{option} {url!r} cannot be read: {' '.join(found.split())}")


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a file that exists: one that may write where the file allows it, for only such a one can undo
    what is half written."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def make_database(url: str, make: Callable[[str], object]) -> None:
    """Have `make` fill a sqlite database that is missing or empty, unless another process does.

    It is given the URL of a file beside, which is put in place in one step: a kill leaves no database, or a whole one.
    """
    path = sqlite_file(url)
    if path is None or _has_tables(path := path.resolve()):
        return
    from filelock import FileLock

    lock, beside = (path.with_name(f"{path.name}.{what}") for what in ("lock", "new"))
    with FileLock(lock):
        if not _has_tables(path):
            for left in (beside, beside.with_name(f"{beside.name}-journal")):
                left.unlink(missing_ok=True)
            with _unhurried():
                make(absolute(sqlite_url(url, beside)))
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        with suppress(OSError):  # whoever takes a lock from now on finds the database
            lock.unlink()


@contextmanager
def _unhurried() -> Iterator[None]:
    """SQLite leaves to the system when it writes what is committed: half the time of making MLflow's tables."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connect(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connect)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connect)


def _has_tables(path: Path) -> bool:
    """Whether something is in a file; also where that cannot be told, which is said by who opens it."""
    if not path.exists():
        return False
    try:
        with _connection(path) as connection:
            return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return True


def patiently(url: str, opening: Callable[[], T]) -> T:
    """What `opening` gives; it is tried again where a server's tables are made by another process at the same time."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for _ in range(ATTEMPTS - 1):
        try:
            return opening()
        except (IntegrityError, ProgrammingError):  # "already exists", in the words of each database
            if sqlite_file(url) is not None:
                raise
            time.sleep(PAUSE)
    return opening()


def artifact_folder(tracking_uri: str) -> Path | None:
    """Where the files of runs go, beside a sqlite database; a server has its own place."""
    path = sqlite_file(tracking_uri)
    return path.resolve().parent / FILES if path else None


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow, Optuna and the disk raise where a record cannot be read or written."""
    from mlflow.exceptions import MlflowException
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    return OSError, MlflowException, OptunaError, SQLAlchemyError


def is_stores_fault(error: Exception) -> bool:
    """Whether a store could not write, as on a full disk, rather than refuse what it was given."""
    return isinstance(error, store_errors()) and getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE"


def record_error(error: Exception) -> RecordError:
    """A store's error as a user reads it."""
    return RecordError(f"the record cannot be read or written any more: {store_reason(error)}")


def store_reason(error: Exception) -> str:
    """The error in one line, without the statement and the address that SQLAlchemy adds."""
    if isinstance(error, OSError) and error.strerror:
        file = error.filename2 or error.filename  # of a copy, the second is the one that is written
        return error.strerror + (f": {str(file)!r}" if file else "")
    return re.split(r"\[SQL:|\(Background on this error", one_line(error))[0].strip()


def absolute(url: str) -> str:
    """The URL with a sqlite file's full path: MLflow keeps connections by URL, wherever the process moves.

    The path from here where a URL has to quote a character of the full one: MLflow would make folders of the quoted
    name. Raises InputError where that does not help.
    """
    if (path := sqlite_file(url)) is None:
        return url
    for way in (path.resolve(), Path(os.path.relpath(path))):
        found = sqlite_url(url, way)
        if found.partition("?")[0].endswith(f":///{way}"):
            return found
    raise InputError(f"{url!r} has a folder with one of ? # % : in its name; run from within the folder")


def move_files(path: Path, old: str, new: str) -> None:
    """Tell MLflow's database that the files of runs whose URIs begin with `old` have those that begin with `new`."""
    with _connection(path) as connection, connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old), old),
            )


def storable(text: str) -> str:
    """The text as every store and file takes it: without lone surrogates and NUL characters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def file_of(uri: str) -> Path:
    """The path of a file URI."""
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(uri).path))
