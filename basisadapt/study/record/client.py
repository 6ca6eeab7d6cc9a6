"""MLflow's client, with redacted arguments, and with few retries until a server has answered once."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from basisadapt.core.errors import InputError
from basisadapt.core.redaction import redacted
from basisadapt.study.record.stores import absolute, make_database, store_reason, with_retries
from basisadapt.study.record.texts import write_into


class RedactingClient:
    """An MlflowClient that redacts secrets in its arguments: texts, tags and parameters, but not files."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*values: Any, **named: Any) -> Any:
            return method(*map(_redact, values), **{key: _redact(value) for key, value in named.items()})

        return call

    def log_files(self, run_id: str, files: Mapping[str, str | bytes]) -> None:
        """Keep files, name to content, with a run; redacts secrets in texts."""
        with tempfile.TemporaryDirectory() as folder:
            write_into(Path(folder), files)
            self.log_artifacts(run_id, folder)


def _redact(value: Any) -> Any:
    from mlflow.entities import Metric, Param, RunTag

    if isinstance(value, list) and value and isinstance(value[0], Metric):
        return value
    if isinstance(value, list) and value and isinstance(value[0], Param | RunTag):
        texts = redacted([(one.key, one.value) for one in value])  # at once: each time all secrets are gathered
        return [type(one)(*text) for one, text in zip(value, texts, strict=True)]
    return redacted(value)


@contextmanager
def few_retries() -> Iterator[None]:
    """Inside, MLflow sends a request at most three times, unless the user has set the number of retries.

    Outside, MLflow's own number holds, so recording survives the restart of a server. Once it has failed, what is left
    to be closed is not waited for as long again.
    """
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ.setdefault(name, "2")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def open_client(tracking_uri: str, study: str) -> tuple[RedactingClient, Any]:
    """The client of a store, and the experiment of the study, or None. Creates a missing sqlite file.

    Raises InputError if the store cannot be opened, or the experiment is deleted.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    for name in ("mlflow", "alembic"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # errors are reported here, in one line

    try:
        url = absolute(tracking_uri)
        make_database(url, _make_tables)
        client = RedactingClient(with_retries(url, lambda: mlflow.MlflowClient(tracking_uri=url)))
        with few_retries():
            found = client.get_experiment_by_name(study)
    except InputError:
        raise
    except Exception as error:  # SQLAlchemy's, MLflow's, a driver's: each has its own
        raise InputError(f"--tracking-uri {tracking_uri!r} cannot be opened: {store_reason(error)}") from error
    if found is not None and found.lifecycle_stage == "deleted":
        raise InputError(
            f"experiment {study!r} is deleted in MLflow; "
            f"`mlflow experiments restore -x {found.experiment_id}` brings it back"
        )
    return client, found


def _make_tables(url: str) -> None:
    """Create MLflow's tables in a sqlite file, and close it."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(url, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
