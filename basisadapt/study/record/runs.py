"""The MLflow run of a cell: its tags, and its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from basisadapt.study.outcome import Outcome
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.texts import read_warnings
from basisadapt.training.execution.json_lines import is_number

TERMINAL = {
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}  # status to MLflow's

# The tags that the engine reads back.
CELL, ROW, STATUS, OWNER = "basisadapt.cell", "basisadapt.row", "status", "basisadapt.owner"
HEADLINE, WARNINGS, ERROR = "basisadapt.headline", "basisadapt.warnings", "basisadapt.error"
ENVIRONMENT, DATA = "environment.", "data."
CLAIMED = "basisadapt.claimed"  # its driver has made sure that no other has the cell
ALIVE = "basisadapt.alive"  # the last heartbeat of its driver, in seconds since 1970
HOST = "basisadapt.imported_from"  # the host of an imported result
UNDRAWN = "basisadapt.undrawn"  # the pictures of an imported result are still to be drawn
ACCUMULATE = "basisadapt.accumulate"  # micro-batches per batch, if memory required it


def read_run(
    run: Any, is_gone: Callable[[Any, Owner], bool], shared: Callable[[dict[str, str]], Mapping[str, str]]
) -> Outcome:
    """The outcome of a run, whoever wrote it. Unreadable content fails its own cell only.

    is_gone: whether the driver of a run is dead.
    shared: returns an equal mapping, the same object for equal arguments.
    """
    tags, ended = run.data.tags, run.info.status in TERMINAL.values()
    metrics = {name: value for name, value in run.data.metrics.items() if is_number(value)}
    headline, error = tags.get(HEADLINE, ""), tags.get(ERROR, "")
    status = tags.get(STATUS, "killed") if ended else "running"
    if ended and TERMINAL.get(status) != run.info.status:
        status = "killed"  # the run did not end as its tag says
    if status == "finished" and headline not in metrics:
        status, error = "failed", f"its record has no finite {headline!r}"
    owner = _owner(tags.get(OWNER, ""))
    orphan = status == "running" and owner is not None and is_gone(run, owner)
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
        environment=shared(_part(tags, ENVIRONMENT)),
        data=shared(_part(tags, DATA)),
    )


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
