"""MLflow's client, which is told no secret, and does not wait long for a server that was never there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from basisadapt.core.errors import InputError
from basisadapt.core.redaction import redacted
from basisadapt.study.record.stores import absolute, make_database, patiently, store_reason


class RedactingClient:
    """An MlflowClient whose methods get their arguments without secrets: texts, tags and parameters, but not files."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def tell(*values: Any, **named: Any) -> Any:
            return method(*map(_cleared, values), **{key: _cleared(value) for key, value in named.items()})

        return tell


def _cleared(value: Any) -> Any:
    from mlflow.entities import Metric, Param, RunTag

    if isinstance(value, list) and value and isinstance(value[0], Metric):
        return value
    if isinstance(value, list) and value and isinstance(value[0], Param | RunTag):
        texts = redacted([(one.key, one.value) for one in value])  # at once: each time all secrets are gathered
        return [type(one)(*text) for one, text in zip(value, texts, strict=True)]
    return redacted(value)


@contextmanager
def impatient() -> Iterator[None]:
    """Inside, a server that does not answer is asked three times and not for minutes, unless the user says how often.

    Outside MLflow's patience holds: who has begun to record can wait for a server that is started again.
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
    """A store's client, and the study's experiment, or None; a missing sqlite file is made. Raises InputError."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    for name in ("mlflow", "alembic"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # an error is told here, in one line

    try:
        url = absolute(tracking_uri)
        make_database(url, _make_tables)
        client = RedactingClient(patiently(url, lambda: mlflow.MlflowClient(tracking_uri=url)))
        with impatient():
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
    """MLflow's tables, in a sqlite file that it then lets go."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(url, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
