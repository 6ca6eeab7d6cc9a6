"""The adapter that MLflow keeps with a run."""

from __future__ import annotations

from pathlib import Path

from basisadapt.core.errors import InputError, one_line
from basisadapt.study.record.client import open_client
from basisadapt.study.record.record import ADAPTER
from basisadapt.study.record.stores import check_sound, sqlite_file


def fetch_adapter(tracking_uri: str, run_id: str, folder: Path) -> Path:
    """Copy the run's adapter below `folder`, and return its folder. Raises InputError if the run has none."""
    from mlflow.exceptions import MlflowException

    path = sqlite_file(tracking_uri)
    if path is not None and not path.exists():
        raise InputError(f"nothing is recorded in {tracking_uri!r}")
    check_sound(tracking_uri, "--tracking-uri")
    client, _ = open_client(tracking_uri, "")
    try:
        client.get_run(run_id)
        if not client.list_artifacts(run_id, ADAPTER):
            raise InputError(f"run {run_id} has no adapter: it was run without --save-adapters, or its method has none")
        return Path(client.download_artifacts(run_id, ADAPTER, str(folder)))
    except (MlflowException, OSError) as error:
        raise InputError(f"no adapter of run {run_id} can be had from {tracking_uri!r}: {one_line(error)}") from error
