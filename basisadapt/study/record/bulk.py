"""All runs of an experiment, read from MLflow's tables at once; and one run's points, written so.

MLflow's client makes an object of every number, of which a run has thousands. Numbers of modules and curves, whose
names have a slash, are left out unless asked for, and so are notes: no table of a study shows them. Behind a server,
MLflow's client reads and writes the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from sqlalchemy import BindParameter, Engine, bindparam, create_engine, text
from sqlalchemy.pool import NullPool

from basisadapt.study.record.stores import absolute

ACTIVE = "run_uuid IN (SELECT run_uuid FROM runs WHERE experiment_id = :experiment AND lifecycle_stage = 'active')"
RUNS = f"SELECT run_uuid, status, start_time, end_time FROM runs WHERE {ACTIVE} ORDER BY start_time DESC, run_uuid"
TAGS = f"SELECT run_uuid, key, value FROM tags WHERE {ACTIVE} AND key != 'mlflow.note.content'"
NUMBERS = f"SELECT run_uuid, key, value FROM latest_metrics WHERE {ACTIVE} AND is_nan = :no"

COLUMNS = "(run_uuid, key, value, timestamp, step, is_nan) VALUES (:run, :key, :value, :now, :step, :no)"
POINTS, LATEST = (f"INSERT INTO {table} {COLUMNS}" for table in ("metrics", "latest_metrics"))


def has_tables(tracking_uri: str) -> bool:
    """Whether MLflow's tables are in a database that can be queried, not behind a server."""
    return tracking_uri.startswith(("sqlite", "postgresql"))


def read_runs(tracking_uri: str, experiment_id: str, metrics: Collection[str], headline: str) -> list[Any]:
    """The active runs of an experiment, latest first: of each the fields of MLflow's `Run` that are used here.

    metrics: names with a slash to include.
    headline: the tag that names one more of them.
    """
    engine = _engine(tracking_uri)
    shown: BindParameter[str] = bindparam("wanted", expanding=True)
    numbers = text(f"{NUMBERS} AND (key NOT LIKE '%/%' OR key IN :wanted)").bindparams(shown)
    known: dict[Any, Any] = {}  # keeps one of equal texts
    of: Mapping[str, Any] = {"experiment": int(experiment_id)}
    with engine.connect().execution_options(yield_per=1000) as connection:  # rows per fetch
        runs: dict[str, Any] = {}
        for run_id, status, began, ended in connection.execute(text(RUNS), of):
            info = SimpleNamespace(run_id=run_id, status=status, start_time=began, end_time=ended)
            runs[run_id] = SimpleNamespace(info=info, data=SimpleNamespace(tags={}, metrics={}))
        for run_id, key, value in connection.execute(text(TAGS), of):
            if run_id in runs:
                runs[run_id].data.tags[known.setdefault(key, key)] = known.setdefault(value, value)
        wanted = {*metrics, *(run.data.tags.get(headline, "") for run in runs.values())}
        for run_id, key, value in connection.execute(numbers, {**of, "no": False, "wanted": [*wanted]}):
            if run_id in runs:
                runs[run_id].data.metrics[known.setdefault(key, key)] = value
    return list(runs.values())


def write_points(tracking_uri: str, run_id: str, points: Iterable[tuple[str, float, int]], now: int) -> None:
    """Add all numbers of a run that has none: (name, finite value, step), at the time `now` in milliseconds since 1970.

    What MLflow shows of a name is its value at the last step, the largest if there are several.
    """
    rows = {
        point: {"run": run_id, "key": point[0], "value": point[1], "step": point[2], "now": now, "no": False}
        for point in points
    }
    latest: dict[str, dict[str, Any]] = {}
    for name, value, step in sorted(rows, key=lambda point: (point[2], point[1])):
        latest[name] = rows[name, value, step]
    if rows:
        with _engine(tracking_uri).begin() as connection:
            connection.execute(text(POINTS), [*rows.values()])
            connection.execute(text(LATEST), [*latest.values()])


def _engine(tracking_uri: str) -> Engine:
    # Of two drivers that write to one file, one waits for the other.
    patience = {"timeout": 60} if tracking_uri.startswith("sqlite") else {}
    return create_engine(absolute(tracking_uri), poolclass=NullPool, connect_args=patience)
