"""Where a study's results and inputs are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from basisadapt.core.errors import InputError, RecordError, refusing
from basisadapt.study.record.stores import artifact_folder, check_database, same_database, sqlite_file, sqlite_url
from basisadapt.study.record.texts import write_into
from basisadapt.study.report.files import KEPT, MARK


@dataclass(frozen=True, kw_only=True)
class StudyPaths:
    """Where a study's results and inputs are.

    tracking_uri: the URI of MLflow's store. Default: MLFLOW_TRACKING_URI, else mlflow.db in the current folder.
    storage: the URL of Optuna's store. Default None, optuna.db in the folder of MLflow's file.
    data_dir: the folder with the tasks' data. Default None, they come from the hub.
    output: a folder that the report is also written to. Default None.
    save_adapters: whether MLflow keeps the adapter of each cell. Default False.
    """

    tracking_uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    storage: str | None = None
    data_dir: Path | None = None
    output: Path | None = None
    save_adapters: bool = False

    @property
    def optuna_url(self) -> str:
        """The URL of Optuna's store."""
        if self.storage is not None:
            return self.storage
        beside = sqlite_file(self.tracking_uri)
        return sqlite_url("sqlite://", Path("optuna.db") if beside is None else beside.with_name("optuna.db"))


def check_paths(place: StudyPaths) -> None:
    """Raise InputError unless both stores and the folder of files can be written."""
    if same_database(place.optuna_url, place.tracking_uri):
        raise InputError(f"--storage and --tracking-uri cannot share one database, {place.tracking_uri!r}")
    check_database(place.tracking_uri, "--tracking-uri")
    check_database(place.optuna_url, "--storage")
    folder = artifact_folder(place.tracking_uri)
    if folder is not None and folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{str(folder)!r}, where the files of runs go, cannot be written")


def make_folder(output: Path) -> None:
    """Create a folder for a report. Raises InputError if it cannot, or if it holds files of no report."""
    with refusing(f"--output {str(output)!r} cannot be created"):
        output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK | os.X_OK):
        raise InputError(f"--output {str(output)!r} cannot be written")
    others = [name for name in KEPT if (output / name).exists()]
    if others and not (output / MARK).exists():
        raise InputError(f"--output {str(output)!r} has a {others[0]} that no report has written; give another folder")


def write_files(files: Mapping[str, str | bytes], output: Path) -> None:
    """Write a report's files into its folder. Raises RecordError if they cannot be written."""
    try:
        write_into(output, files)
    except OSError as error:
        raise RecordError(f"--output {str(output)!r} cannot be written: {error.strerror}") from error
