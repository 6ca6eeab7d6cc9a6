"""The MLflow runs of a study's cells: their tags, and reading them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.record.bulk import has_tables, read_runs
from basisadapt.study.record.client import RedactingClient
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.texts import read_warnings
from basisadapt.training.execution.json_lines import is_number

# Status to MLflow's.
TERMINAL = {"finished": "FINISHED", "diverged": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

# The tags that the engine reads back.
CELL, ROW, STATUS, OWNER = "basisadapt.cell", "basisadapt.row", "status", "basisadapt.owner"
HEADLINE, WARNINGS, ERROR = "basisadapt.headline", "basisadapt.warnings", "basisadapt.error"
ENVIRONMENT, DATA = "environment.", "data."
CLAIMED = "basisadapt.claimed"  # its driver has made sure that no other has the cell
ALIVE = "basisadapt.alive"  # the last heartbeat of its driver, in seconds since 1970
HOST = "basisadapt.imported_from"  # the host of an imported result
UNDRAWN = "basisadapt.undrawn"  # the pictures of an imported result are still to be drawn
ACCUMULATE = "basisadapt.accumulate"  # micro-batches per batch, if memory required it

SILENCE = 180.0  # seconds without a heartbeat until a driver elsewhere counts as dead


class Runs:
    """The runs of a study's experiment, as MLflow or `bulk.read_runs` give them, and their outcomes.

    experiment_id: of the experiment; None while there is none.
    metrics: names with a slash that every() includes; it includes all without.
    """

    def __init__(
        self, client: RedactingClient, tracking_uri: str, experiment_id: str | None, metrics: Collection[str]
    ) -> None:
        self.experiment_id = experiment_id
        self._client, self._tracking_uri, self._metrics = client, tracking_uri, metrics
        self._seen: dict[str, tuple[str, float]] = {}  # run id to its last heartbeat, and when that was first seen
        self._texts: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}

    def every(self) -> Iterable[Any]:
        """All runs, latest first."""
        if self.experiment_id is None or not has_tables(self._tracking_uri):
            return self.where()
        return read_runs(self._tracking_uri, self.experiment_id, self._metrics, HEADLINE)

    def of(self, cell: Cell) -> Iterable[Any]:
        """The runs of a cell."""
        return self.where(f"tags.`{CELL}` = '{cell.key}'")

    def where(self, condition: str = "") -> Iterable[Any]:
        """The runs that meet a condition in MLflow's search syntax."""
        token: str | None = None
        while self.experiment_id is not None:
            page = self._client.search_runs([self.experiment_id], condition, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def outcome(self, run: Any) -> Outcome:
        """The outcome of a run, whoever wrote it. Unreadable content fails its own cell only."""
        tags, ended = run.data.tags, run.info.status in TERMINAL.values()
        metrics = {name: value for name, value in run.data.metrics.items() if is_number(value)}
        headline, error = tags.get(HEADLINE, ""), tags.get(ERROR, "")
        status = tags.get(STATUS, "killed") if ended else "running"
        if ended and TERMINAL.get(status) != run.info.status:
            status = "killed"  # the run did not end as its tag says
        if status == "finished" and headline not in metrics:
            status, error = "failed", f"its record has no finite {headline!r}"
        owner = _owner(tags.get(OWNER, ""))
        orphan = status == "running" and owner is not None and self._is_gone(run, owner)
        return Outcome(
            run_id=run.info.run_id,
            key=tags.get(CELL, ""),
            status=status,
            headline=headline,
            metrics=metrics,
            warnings=read_warnings(tags.get(WARNINGS, "[]")),
            error=error,
            ended=run.info.end_time or 0,
            busy=status == "running" and owner not in (None, Owner.me()) and not orphan,
            claimed=CLAIMED in tags,
            orphan=orphan,
            environment=self._shared(_part(tags, ENVIRONMENT)),
            data=self._shared(_part(tags, DATA)),
        )

    def _shared(self, texts: dict[str, str]) -> Mapping[str, str]:
        """The same object for equal mappings: most cells of a study have the same versions and data."""
        return self._texts.setdefault(tuple(texts.items()), texts)

    def _is_gone(self, run: Any, owner: Owner) -> bool:
        """Whether the driver of a run is dead: it has ended here, or elsewhere sent no heartbeat for SILENCE seconds.

        A heartbeat counts when it differs from the last one, so the clocks of two hosts are never compared.
        """
        if owner.is_here or owner.is_dead:
            return owner.is_dead
        sign, now = run.data.tags.get(ALIVE, ""), time.monotonic()
        seen, since = self._seen.setdefault(run.info.run_id, (sign, now))
        if sign != seen:
            self._seen[run.info.run_id] = sign, now
            return False
        return now - since > SILENCE


def precedence(outcome: Outcome) -> tuple[int, int]:
    """A sort key: the run that represents its cell comes first."""
    if outcome.done:
        return 0, outcome.ended
    return (1, 0) if outcome.status == "running" else (2, -outcome.ended)


def _part(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in tags.items() if name.startswith(prefix)}


def _owner(text: str) -> Owner | None:
    try:
        return Owner.parse(text)
    except ValueError:
        return None


def signature() -> dict[str, str]:
    """The tags of a run that name its owner."""
    return {OWNER: str(Owner.me()), ALIVE: sign()}


def sign() -> str:
    """A heartbeat, different from the one before: the time in seconds since 1970."""
    return f"{time.time():.3f}"
