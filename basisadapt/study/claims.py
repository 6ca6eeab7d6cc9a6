"""The paper's claims in a form that can be checked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from basisadapt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper in one of three forms, over labels of a study's rows.

    better, than: each row of the first has the greater `metric` than each of the second. increasing: the metric grows
    along these rows. rows with at_most or equals: the metric of each is at most so much, or rounds to so much.
    metric: any recorded one; None is the headline metric. per: take 100 · metric / this metric of the same row.
    relative_to: take 100 · (metric / the same of that row − 1). With several tasks, a label without its task stands
    for the row's means over seeds, paired by task. In a claim that compares, labels joined by " + " stand for the sum
    of their rows: a gain of two changes above the sum of their gains is better "both + neither" than "one + other".
    Raises InputError for a claim in none of these forms.
    """

    text: str
    better: str | list[str] | None = None
    than: str | list[str] | None = None
    increasing: list[str] | None = None
    rows: str | list[str] | None = None
    at_most: float | None = None
    equals: float | None = None
    metric: str | None = None
    per: str | None = None
    relative_to: str | None = None

    def __post_init__(self) -> None:
        compares = bool(self.better and self.than)
        grows = self.increasing is not None and len(self.increasing) > 1
        counts = bool(self.rows and self.metric) and (self.at_most is None) != (self.equals is None)
        if [compares, grows, counts].count(True) != 1:
            raise InputError(
                f"claim {self.text!r} needs one of: better and than; increasing (two labels or more); "
                "rows and metric with at_most or equals"
            )
        if not counts and (self.per or self.relative_to):
            raise InputError(f"claim {self.text!r}: per and relative_to belong to rows with at_most or equals")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(the row that is claimed to have more, the other), for a claim that compares."""
        if self.increasing:
            return [(later, earlier) for earlier, later in itertools.pairwise(self.increasing)]
        return list(itertools.product(listed(self.better), listed(self.than)))

    @property
    def labels(self) -> list[str]:
        """Every label that the claim names."""
        named = [part for pair in self.pairs for label in pair for part in summed(label)]
        named += listed(self.rows) + listed(self.relative_to)
        return list(dict.fromkeys(named))


def listed(labels: str | list[str] | None) -> list[str]:
    """One label or several, as a list."""
    return [labels] if isinstance(labels, str) else labels or []


def summed(label: str) -> list[str]:
    """The labels that are joined in one."""
    return label.split(" + ")
