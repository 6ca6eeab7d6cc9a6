"""The outcome of a cell, as recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from basisadapt.training.execution.json_lines import DONE

NOT_RUN = "not run"  # the state of a cell without a recorded run


@dataclass(frozen=True)
class Outcome:
    """What the record holds of a cell.

    run_id: the id of its MLflow run.
    key: the key of the cell.
    status: "running", "finished", "diverged", "failed" or "killed".
    headline: the name of the metric that is compared.
    metrics: name to final value; finite values only.
    warnings: the warnings of the run.
    error: why the cell failed, or "".
    ended: milliseconds since 1970, 0 while the run is open.
    busy: whether another process is running the cell now.
    claimed: whether the driver has made sure that no other process has the cell.
    orphan: whether the run is open although its process is dead, or has sent no heartbeat for too long.
    environment: name to version.
    data: name to text: the fingerprint, the split and the backbone's note.
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
