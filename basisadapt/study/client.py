"""MLflow's client, which is told no secret."""

from __future__ import annotations

from collections.abc import Callable
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
