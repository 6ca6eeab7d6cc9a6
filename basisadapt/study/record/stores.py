"""The stores: sqlite files, created atomically and checked first, and the errors of any store."""

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

from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from basisadapt.core.errors import InputError, RecordError, one_line, refusing

T = TypeVar("T")

FILES = "mlruns"  # the folder of the runs' files, beside a sqlite database
ATTEMPTS, PAUSE = 5, 2.0  # if another process creates the tables, and the seconds between


def sqlite_file(url: str) -> Path | None:
    """The file behind a sqlite URL; None for other databases. Raises InputError for a URL that names no file."""
    if not url.startswith("sqlite"):
        return None
    try:
        database = make_url(url).database
    except ArgumentError:
        return None  # opening it reports the error
    if not database or database.startswith((":memory:", "file:")):
        raise InputError(f"{url!r} must name a file, as sqlite:///mlflow.db does")
    return Path(database)


def sqlite_url(like: str, path: Path) -> str:
    """The URL `like` with another file."""
    return make_url(like).set(database=str(path)).render_as_string(hide_password=False)


def same_database(one: str, other: str) -> bool:
    """Whether two URLs name the same database."""
    files = [sqlite_file(url) for url in (one, other)]
    return one == other if None in files else len({path.resolve() for path in files if path is not None}) == 1


def check_database(url: str, option: str) -> None:
    """Raise InputError unless a sqlite database is intact and can be written, or created. Leaves nothing behind."""
    path = sqlite_file(url)
    if path is None:
        return
    check_sound(url, option)
    with refusing(f"{option} {url!r} cannot be written", OSError, sqlite3.Error):
        with tempfile.TemporaryFile(dir=path.resolve().parent):  # where its journal goes
            pass
        if path.exists():
            with _connection(path) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()


def check_sound(url: str, option: str) -> None:
    """Raise InputError if a sqlite database is damaged, or no database. Rolls back what a kill left half written."""
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


def check_recorded(tracking_uri: str) -> None:
    """Raise InputError for a sqlite database that does not exist, or that `check_sound` refuses."""
    path = sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        raise InputError(f"nothing is recorded in {tracking_uri!r}")
    check_sound(tracking_uri, "--tracking-uri")


@contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an existing file, read-write if possible, since only that can roll back a half-written change."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def make_database(url: str, make: Callable[[str], object]) -> None:
    """Fill a missing or empty sqlite database with `make`, unless another process does.

    make: gets the URL of a temporary file, which then replaces the database atomically.
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
            with _without_fsync():
                make(absolute(sqlite_url(url, beside)))
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        with suppress(OSError):  # later lock holders find the database
            lock.unlink()


@contextmanager
def _without_fsync() -> Iterator[None]:
    """SQLite does not wait for the disk, which takes half the time of creating MLflow's tables."""

    def connect(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connect)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connect)


def _has_tables(path: Path) -> bool:
    """Whether a database has tables; also True if it cannot be read, since opening it reports the error."""
    if not path.exists():
        return False
    try:
        with _connection(path) as connection:
            return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return True


def with_retries(url: str, opening: Callable[[], T]) -> T:
    """The result of `opening`, retried while another process creates the tables of a server's database."""
    for _ in range(ATTEMPTS - 1):
        try:
            return opening()
        except (IntegrityError, ProgrammingError):  # "already exists", in the words of each database
            if sqlite_file(url) is not None:
                raise
            time.sleep(PAUSE)
    return opening()


def artifact_folder(tracking_uri: str) -> Path | None:
    """The folder for the files of runs, next to a sqlite database; None for other stores."""
    path = sqlite_file(tracking_uri)
    return path.resolve().parent / FILES if path else None


def store_errors() -> tuple[type[Exception], ...]:
    """The errors of MLflow, Optuna and the disk when a record cannot be read or written."""
    from mlflow.exceptions import MlflowException
    from optuna.exceptions import OptunaError

    return OSError, MlflowException, OptunaError, SQLAlchemyError


def is_stores_fault(error: Exception) -> bool:
    """Whether a store has failed, as on a full disk, and not refused a value."""
    return isinstance(error, store_errors()) and getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE"


def record_error(error: Exception) -> RecordError:
    """A store's error as a RecordError."""
    return RecordError(f"the record cannot be read or written any more: {store_reason(error)}")


def store_reason(error: Exception) -> str:
    """The error in one line, without the statement and the address that SQLAlchemy adds."""
    if isinstance(error, OSError) and error.strerror:
        file = error.filename2 or error.filename  # a copy writes the second
        return error.strerror + (f": {str(file)!r}" if file else "")
    return re.split(r"\[SQL:|\(Background on this error", one_line(error))[0].strip()


def absolute(url: str) -> str:
    """The URL with the full path of a sqlite file, since MLflow caches connections by URL.

    It is the relative path if a URL must quote a character of the full one: MLflow would create folders of the quoted
    name. Raises InputError if the relative path needs quotes too.
    """
    if (path := sqlite_file(url)) is None:
        return url
    for way in (path.resolve(), Path(os.path.relpath(path))):
        found = sqlite_url(url, way)
        if found.partition("?")[0].endswith(f":///{way}"):
            return found
    raise InputError(f"{url!r} has a folder with one of ? # % : in its name; run from within the folder")


def follow_files(tracking_uri: str, study: str, location: str) -> None:
    """Update MLflow's file URIs if the database and the files next to it were moved from `location`, a study's folder.

    Files in a folder of the user's choice, and files that were not moved, keep their URIs.
    """
    path, folder = sqlite_file(tracking_uri), artifact_folder(tracking_uri)
    mine = f"/{FILES}/{urllib.parse.quote(study)}"
    if path is None or folder is None or not location.startswith("file:") or not location.endswith(mine):
        return
    old, new = location.removesuffix(mine) + f"/{FILES}/", f"{folder.as_uri()}/"
    if old != new and (folder.exists() or not file_of(old).exists()):
        # Where the database is read-only, pictures are not found.
        with suppress(sqlite3.Error), _connection(path) as connection, connection:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


def storable(text: str) -> str:
    """The text without lone surrogates and NUL characters, which some stores refuse."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def file_of(uri: str) -> Path:
    """The path of a file URI."""
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(uri).path))
