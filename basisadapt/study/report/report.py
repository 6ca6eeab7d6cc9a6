"""A report: a study's table, the verdicts on its claims, and what tuning or a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from basisadapt.study.report.verdicts import Verdict, judge

if TYPE_CHECKING:
    from basisadapt.study.plan.space import Space
    from basisadapt.study.plan.tuning import Tuned
    from basisadapt.study.report.table import Table


@dataclass(frozen=True)
class EndedTrial:
    """A trial that came to an end. status: "finished" (with a value), "diverged" or "failed"."""

    number: int
    status: str
    value: float | None
    params: Mapping[str, Any]

    @property
    def label(self) -> str:
        """What its row is called."""
        return f"trial {self.number}"


@dataclass(frozen=True)
class SearchResult:
    """What a search has found so far. importance: setting to share, or empty for the reason in no_importance."""

    sampler: str
    wanted: int
    seeds: Sequence[int]
    space: Space
    trials: Sequence[EndedTrial]
    importance: Mapping[str, float]
    no_importance: str

    @property
    def ranked(self) -> list[EndedTrial]:
        """The trials, best first; those without a value last."""
        return sorted(self.trials, key=lambda trial: (trial.value is None, -(trial.value or 0.0), trial.number))


@dataclass(frozen=True, eq=False)
class Report:
    """What is said of a study. search, tuned: what a search or tuning has found, where there was one."""

    table: Table
    verdicts: tuple[Verdict, ...]
    search: SearchResult | None = None
    tuned: Tuned | None = None

    @property
    def has_failures(self) -> bool:
        """Whether a cell failed or diverged, or a trial of the search or of tuning did."""
        trials = self.search.trials if self.search else ()
        tuned = self.tuned is not None and self.tuned.has_failures
        return self.table.has_failures or tuned or any(trial.value is None for trial in trials)


def make_report(table: Table, search: SearchResult | None = None, tuned: Tuned | None = None) -> Report:
    """The report on a table."""
    return Report(table, judge(table), search, tuned)
