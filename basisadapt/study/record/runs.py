"""A cell's run in MLflow: the tags by which it is known, and what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from basisadapt.study.outcome import Outcome
from basisadapt.study.record.owner import Owner
from basisadapt.study.record.texts import read_warnings
from basisadapt.training.execution.lines import is_number

TERMINAL = {
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}  # MLflow's words

# The tags that the engine reads back.
CELL, ROW, STATUS, OWNER = "basisadapt.cell", "basisadapt.row", "status", "basisadapt.owner"
HEADLINE, WARNINGS, ERROR = "basisadapt.headline", "basisadapt.warnings", "basisadapt.error"
ENVIRONMENT, DATA = "environment.", "data."
CLAIMED = "basisadapt.claimed"  # its driver knows that no other has the cell
ALIVE = "basisadapt.alive"  # when its driver was last known to live, in seconds since 1970
HOST = "basisadapt.imported_from"  # the machine that computed what is imported
UNDRAWN = "basisadapt.undrawn"  # the pictures of what is imported are still to be drawn
ACCUMULATE = "basisadapt.accumulate"  # how many smaller batches made up a batch, where memory asked for it


def read_run(
    run: Any, is_gone: Callable[[Any, Owner], bool], shared: Callable[[dict[str, str]], Mapping[str, str]]
) -> Outcome:
    """What a run says, whoever wrote it: what cannot be read fails its own cell alone.

    is_gone: whether a run's driver is dead. shared: a mapping, or an equal one that is kept.
    """
    tags, ended = run.data.tags, run.info.status in TERMINAL.values()
    metrics = {name: value for name, value in run.data.metrics.items() if is_number(value)}
    headline, error = tags.get(HEADLINE, ""), tags.get(ERROR, "")
    status = tags.get(STATUS, "killed") if ended else "running"
    if ended and TERMINAL.get(status) != run.info.status:
        status = "killed"  # what the tag says was not confirmed by the run's end
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
    """Sorts first the run that stands for its cell."""
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
    """The tags that say whose a run is."""
    return {OWNER: str(Owner.me()), ALIVE: sign()}


def sign() -> str:
    """A sign of life, unlike the one before."""
    return f"{time.time():.3f}"
