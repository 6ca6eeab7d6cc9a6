"""A report: a study's table, the verdicts on its claims, and the result of its tuning or search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from basisadapt.study.plan.space import Space
from basisadapt.study.plan.tuning import Tuned
from basisadapt.study.report.table import Table
from basisadapt.study.report.verdicts import Verdict, judge


@dataclass(frozen=True)
class EndedTrial:
    """A trial of a search that has ended.

    number: counts from 1.
    status: "finished", "diverged" or "failed".
    value: the mean headline metric over its cells; None unless finished.
    params: full key to value.
    """

    number: int
    status: str
    value: float | None
    params: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The label of its row."""
        return f"trial {self.number}"


@dataclass(frozen=True)
class SearchResult:
    """The result of a search so far.

    sampler: "tpe" or "random".
    wanted: the number of trials asked for.
    seeds: the seeds of every trial.
    space: setting to its range or choices.
    trials: the trials that have ended.
    importance: setting to its share of the variance, summing to 1; empty for the reason in `no_importance`.
    """

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
    """The report on a study.

    table: its table.
    verdicts: one per claim.
    search: the result of the search. Default None, a grid.
    tuned: the result of tuning. Default None, nothing was tuned.
    """

    table: Table
    verdicts: tuple[Verdict, ...]
    search: SearchResult | None = None
    tuned: Tuned | None = None

    @property
    def has_failures(self) -> bool:
        """Whether a cell, or a trial of the search or of tuning, failed or diverged."""
        trials = self.search.trials if self.search else ()
        tuned = self.tuned is not None and self.tuned.has_failures
        return self.table.has_failures or tuned or any(trial.value is None for trial in trials)


def make_report(table: Table, search: SearchResult | None = None, tuned: Tuned | None = None) -> Report:
    """The report on a table, with the verdicts on its claims."""
    return Report(table, judge(table), search, tuned)
