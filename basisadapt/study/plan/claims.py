"""The paper's claims in a form that can be checked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from basisadapt.core.errors import InputError, shown

COMMON = "common"  # at: the value that all rows share (`tune.common`)
PLATEAU = "plateau"  # a metric of a row's curve, see `Table.plateau`


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper in one of four forms. Rows are given by their labels.

    text: the sentence.
    better, than: the metric of each row in `better` is greater than that of each row in `than`.
    increasing: the metric increases along these rows, two or more.
    equal, to, margin: the metrics of each row in `equal` and each row in `to` differ by less than `margin`, above 0.
        The unit is one percentage point for a headline metric shown as a percentage, else the metric's own.
    rows: the metric of each of these rows is bounded by `at_most`, or rounds to `equals`.
    metric: a recorded metric, or "plateau" (see `Table.plateau`). Default None, the headline metric.
    at: compare the rows at this value of the tuned setting, "common" for `tune.common`. Default None: each row at its
        own choice.
    per: take 100 · metric / this metric, both of the same row. Default None.
    relative_to: take 100 · (metric / the metric of this row − 1). Default None.

    With several tasks, a label without its task stands for the means over seeds, paired by task. In `better`, `than`,
    `equal` and `to`, labels joined by " + " stand for the sum of their rows. So "two changes gain more than the sum of
    their gains" is better "both + neither" than "one + other". Raises InputError for any other form.
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
        """The pairs of rows (greater or equal, other) that the claim compares; empty if it compares none."""
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
    """The labels that " + " joins in one."""
    return label.split(" + ")
