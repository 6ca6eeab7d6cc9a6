"""Where records lie: sqlite files, looked at before they are trusted, and what goes wrong with any store."""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from basisadapt.errors import InputError, RecordError, one_line


def sqlite_file(url: str) -> Path | None:
    """The file behind a sqlite URL; None for other databases."""
    return Path(url.removeprefix("sqlite:///").partition("?")[0]) if url.startswith("sqlite:///") else None


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
            with _connection(path, "rw") as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option} {url!r} cannot be written: {reason}") from error


def check_sound(url: str, option: str) -> None:
    """Raise InputError if a sqlite database is damaged, or no database."""
    path = sqlite_file(url)
    if path is None or not path.exists():
        return
    try:
        with _connection(path, "ro") as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise InputError(f"{option} {url!r} cannot be read: {' '.join(found.split())}")


@contextmanager
def _connection(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def artifact_folder(tracking_uri: str) -> Path | None:
    """Where the files of runs go, beside a sqlite database; a server has its own place."""
    path = sqlite_file(tracking_uri)
    return path.resolve().parent / "mlruns" if path else None


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
    """The URL with a sqlite file's full path: MLflow keeps connections by URL, wherever the process moves."""
    path = sqlite_file(url)
    return url if path is None else url.replace(str(path), str(path.resolve()), 1)
