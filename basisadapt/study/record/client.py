"""MLflow's client, which is told no secret, and does not wait long for a server that was never there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from basisadapt.redaction import redacted


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
    from mlflow.entities import Param, RunTag

    if isinstance(value, list):
        return [_cleared(item) for item in value]
    if isinstance(value, Param | RunTag):
        return type(value)(redacted(value.key), redacted(value.value))
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
