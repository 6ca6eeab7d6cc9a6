"""The paper's claims in a form that can be checked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from basisadapt.core.errors import InputError, shown

COMMON = "common"  # at: the value that all rows have in common (`tune.common`)
PLATEAU = "plateau"  # the metric of a row's curve: how many octaves of the tuned setting lie within a point of its best


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper in one of four forms, over labels of a study's rows.

    better, than: each row of the first has the greater `metric` than each of the second. increasing: the metric grows
    along these rows. equal, to, margin: each row of the first differs from each of the second by less than the margin,
    above 0: in points of the headline metric (hundredths of a fraction that is read as a percentage), in units of any
    other. rows with at_most or equals: the metric of each is at most so much, or rounds to so much.
    metric: any recorded one, or "plateau" (see `Table.plateau`); None is the headline metric. at: rows as they were run
    at that value of the tuned setting, "common" for `tune.common`; None is each at its own choice.
    per: take 100 · metric / this metric of the same row. relative_to: take 100 · (metric / the same of that row − 1).
    With several tasks, a label without its task stands for the row's means over seeds, paired by task. In a claim that
    compares, labels joined by " + " stand for the sum of their rows: a gain of two changes above the sum of their gains
    is better "both + neither" than "one + other".
    Raises InputError for a claim in none of these forms.
    """

    text: str
    better: str | list[str] | None = None
    than: str | list[str] | None = None
    increasing: list[str] | None = None
    equal: str | list[str] | None = None
    to: str | list[str] | None = None
    margin: float | None = None
    rows: str | list[str] | None = None
    at_most: float | None = None
    equals: float | None = None
    metric: str | None = None
    at: float | str | None = None
    per: str | None = None
    relative_to: str | None = None

    def __post_init__(self) -> None:
        compares = bool(self.better and self.than)
        grows = self.increasing is not None and len(self.increasing) > 1
        alike = bool(self.equal and self.to) and self.margin is not None
        counts = bool(self.rows and self.metric) and (self.at_most is None) != (self.equals is None)
        if [compares, grows, alike, counts].count(True) != 1:
            raise InputError(
                f"claim {self.text!r} needs one of: better and than; increasing (two labels or more); "
                "equal, to and margin; rows and metric with at_most or equals"
            )
        if self.margin is not None and not (alike and self.margin > 0):
            raise InputError(f"claim {self.text!r}: margin must be above 0 and belongs to equal, got {self.margin:g}")
        if isinstance(self.at, str) and self.at != COMMON:
            raise InputError(f"claim {self.text!r}: at must be a number or {COMMON}, got {shown(self.at)}")
        if self.at is not None and self.metric == PLATEAU:
            raise InputError(f"claim {self.text!r}: a plateau is of the whole curve and has no at")
        if not counts and (self.per or self.relative_to):
            raise InputError(f"claim {self.text!r}: per and relative_to belong to rows with at_most or equals")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(the row that is claimed to have more, or as much, the other), for a claim that compares."""
        if self.equal:
            return list(itertools.product(listed(self.equal), listed(self.to)))
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
