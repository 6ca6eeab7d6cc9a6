"""The adapters that MLflow keeps with runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from basisadapt.core.errors import InputError, one_line
from basisadapt.study.record.client import open_client
from basisadapt.study.record.record import ADAPTER
from basisadapt.study.record.stores import check_recorded


def with_adapters(tracking_uri: str, run_ids: Sequence[str]) -> list[str]:
    """Those of the runs with which an adapter is kept, in their order."""
    client, _ = open_client(tracking_uri, "")
    return [run_id for run_id in run_ids if client.list_artifacts(run_id, ADAPTER)]


def fetch_adapter(tracking_uri: str, run_id: str, folder: Path) -> Path:
    """Copy the run's adapter below `folder`, and return its folder. Raises InputError if the run has none."""
    from mlflow.exceptions import MlflowException

    check_recorded(tracking_uri)
    client, _ = open_client(tracking_uri, "")
    try:
        client.get_run(run_id)
        if not client.list_artifacts(run_id, ADAPTER):
            raise InputError(f"run {run_id} has no adapter: it was run without --save-adapters, or its method has none")
        return Path(client.download_artifacts(run_id, ADAPTER, str(folder)))
    except (MlflowException, OSError) as error:
        raise InputError(f"no adapter of run {run_id} in {tracking_uri!r}: {one_line(error)}") from error
