"""What became of a cell, as far as it is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from basisadapt.training.execution.lines import DONE

NOT_RUN = "not run"  # the state of a cell that the record lacks


@dataclass(frozen=True)
class Outcome:
    """What the record holds of a cell. Times are in milliseconds since 1970.

    run_id: its MLflow run, key: its cell's.
    status: "running", "finished", "diverged", "failed" or "killed".
    headline: the name of the metric that is compared.
    metrics: name to final value, of the finite ones.
    warnings, error: what its run said; error is of a failed cell.
    ended: 0 while it runs.
    busy: another process is at it now.
    claimed: its driver knows that no other has the cell.
    orphan: running though its process is gone: seen to be so, or silent for too long elsewhere.
    environment, data: versions and files, name to text.
    """

    run_id: str
    key: str
    status: str
    headline: str
    metrics: Mapping[str, float]
    warnings: tuple[str, ...]
    error: str
    ended: int = 0
    busy: bool = False
    claimed: bool = False
    orphan: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the cell needs no further run."""
        return self.status in DONE

    @property
    def value(self) -> float | None:
        """The headline metric, of a finished cell."""
        return self.metrics.get(self.headline) if self.status == "finished" else None
