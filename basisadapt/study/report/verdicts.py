"""Verdicts on the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from basisadapt.study import statistics
from basisadapt.study.plan.claims import PLATEAU, Claim, listed, summed
from basisadapt.study.report.table import Table
from basisadapt.study.statistics import Difference, Equivalence

REPRODUCED, NOT_REPRODUCED, UNTESTABLE = "reproduced", "not reproduced", "not testable here"
LEVEL = 0.05  # of the family of all tests behind a study's claims (paper, section B.2)
COUNTED = "parameters."  # metrics that are counted, not measured: without error, so one seed is enough


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    claim: the claim.
    word: REPRODUCED, NOT_REPRODUCED or UNTESTABLE.
    because: the numbers behind it, one text per comparison.
    """

    claim: Claim
    word: str
    because: tuple[str, ...]


@dataclass(frozen=True)
class _Test:
    """The test of one pair of a claim's rows.

    p: the p-value of the difference, or of the equivalence if that is claimed.
    published: the published difference, in percentage points.
    scale: the factor from recorded to shown numbers.
    """

    claim: Claim
    pair: tuple[str, str]
    difference: Difference | None
    equivalence: Equivalence | None
    p: float | None
    published: float | None
    scale: float

    def number(self, value: float, sign: str = "+") -> str:
        """A value as it is shown."""
        return format(value * self.scale, f"{sign}.2f" if self.scale == 100 else f"{sign}.4g")


def judge(table: Table) -> tuple[Verdict, ...]:
    """The verdict on each claim of the study; p-values are Holm-adjusted over the tests of all claims."""
    claims = table.study.spec.claims
    found = [[_test(table, claim, pair) for pair in claim.pairs] for claim in claims]
    adjusted = iter(statistics.holm([test.p for tests in found for test in tests]))
    verdicts = []
    for claim, tests in zip(claims, found, strict=True):
        tests = [replace(test, p=next(adjusted)) for test in tests]
        verdicts.append(_compared(table, claim, tests) if tests else _counted(table, claim))
    return tuple(verdicts)


def _test(table: Table, claim: Claim, pair: tuple[str, str]) -> _Test:
    one, other = (_values(table, claim, label) for label in pair)
    difference, scale = statistics.difference(one, other), 100 if table.percent and claim.metric is None else 1
    published = _published_difference(table, pair) if scale == 100 and claim.margin is None else None
    if claim.margin is None or difference is None:
        return _Test(claim, pair, difference, None, difference.p if difference else None, published, scale)
    equivalence = statistics.equivalence(difference, claim.margin / scale)
    return _Test(claim, pair, difference, equivalence, equivalence.p if equivalence else None, published, scale)


def _values(table: Table, claim: Claim, label: str) -> dict[Any, float]:
    """Seed, or task, to the value of a row; for several rows, to the sum if all of them have a value."""
    rows = [{**table.where(claim.at).values(part, claim.metric)} for part in summed(label)]
    return {key: sum(row[key] for row in rows) for key in rows[0] if all(key in row for row in rows)}


def _compared(table: Table, claim: Claim, tests: Sequence[_Test]) -> Verdict:
    words, reasons = [], []
    how = "to" if claim.equal else "over"
    for test in tests:
        word, why = _word(table, test)
        words.append(word)
        where = "" if claim.at is None else f" at {table.place(claim.at)}"
        reasons.append(f"{test.pair[0]} {how} {test.pair[1]}{where}: {_shown(table, test)}{why}")
    if NOT_REPRODUCED in words:
        return Verdict(claim, NOT_REPRODUCED, tuple(reasons))
    return Verdict(claim, UNTESTABLE if UNTESTABLE in words else REPRODUCED, tuple(reasons))


def _word(table: Table, test: _Test) -> tuple[str, str]:
    """The verdict's word for one pair, and a reason that the numbers do not show."""
    difference = test.difference
    if difference is None:
        return UNTESTABLE, ""
    if (test.claim.metric or "").startswith(COUNTED):
        return (REPRODUCED if difference.mean > 0 else NOT_REPRODUCED), " (counted)"
    if difference.low is None or difference.high is None or test.p is None:
        return UNTESTABLE, " (one seed)" if difference.n == 1 else " (the same on every seed)"
    if test.equivalence is not None and test.claim.margin is not None:
        word, why = _equal(test.p, difference.low, difference.high, test.claim.margin / test.scale)
    else:
        word, why = _better(test, test.p, difference.mean, difference.low, difference.high)
    opened = [row for part in _doubtful(test, word) for row in table.open_plateaus(part)]
    if opened:
        return UNTESTABLE, f"{why}; of {', '.join(opened)} it is a lower bound: the plateau reaches an end of the grid"
    return word, why


def _better(test: _Test, p: float, mean: float, low: float, high: float) -> tuple[str, str]:
    if p < LEVEL:
        return (REPRODUCED, "") if mean > 0 else (NOT_REPRODUCED, ": significantly the other way")
    seen = f"a difference of {test.number((high - low) / 2, '')} could have been seen"
    published = test.published
    if published is not None and high * test.scale < published and published > 0:
        return NOT_REPRODUCED, f": the interval excludes the published difference; {seen}"
    return UNTESTABLE, f": no power to tell{' it from zero' if published is None else ''}; {seen}"


def _equal(p: float, low: float, high: float, margin: float) -> tuple[str, str]:
    if p < LEVEL:
        return REPRODUCED, ""
    if low > margin or high < -margin:
        return NOT_REPRODUCED, ": the interval lies beyond the margin"
    return UNTESTABLE, ": no power to tell"


def _doubtful(test: _Test, word: str) -> list[str]:
    """The labels whose plateaus could change the word if they are wider than the grid shows."""
    if test.claim.metric != PLATEAU or word == UNTESTABLE:
        return []
    more, less = (summed(label) for label in test.pair)
    if test.claim.equal:
        return [*more, *less]
    return less if word == REPRODUCED else more


def _shown(table: Table, test: _Test) -> str:
    """The difference with its interval, p-value, margin and published counterpart."""
    difference = test.difference
    if difference is None:
        parts = (part for label in test.pair for part in summed(label))
        missing = [part for part in parts if not table.where(test.claim.at).values(part, test.claim.metric)]
        return f"nothing finished of {' and '.join(missing)}" if missing else "no seed in common"
    text = test.number(difference.mean)
    if difference.low is not None and difference.high is not None:
        text += f" [{test.number(difference.low)}, {test.number(difference.high)}]"
    if test.claim.margin is not None:
        text += f", margin {test.claim.margin:g}"
    if test.p is not None:
        text += ", p < 0.001" if test.p < 0.001 else f", p {test.p:.3f}"
    if test.equivalence is not None:
        half = test.equivalence.half
        least = test.number(abs(difference.mean) + half, "")
        text += f", 90 % interval ± {test.number(half, '')}, within any margin above {least}"
    return text if test.published is None else f"{text}, published {test.published:+.2f}"


def _published_difference(table: Table, pair: tuple[str, str]) -> float | None:
    try:
        more, less = (sum(float(table.published(part) or "") for part in summed(label)) for label in pair)
        return more - less
    except ValueError:  # not printed for one of the two
        return None


def _counted(table: Table, claim: Claim) -> Verdict:
    """The verdict on rows with at_most or equals."""
    words, reasons = [], []
    sign = " %" if claim.per or claim.relative_to else ""
    bound = claim.equals if claim.at_most is None else claim.at_most
    assert bound is not None
    for label in listed(claim.rows):
        value = _number(table, claim, label)
        if value is None:
            words.append(UNTESTABLE)
            reasons.append(f"{label}: nothing recorded to take it from")
            continue
        # A published number has the digits it is printed with: ours is rounded to as many.
        holds = value <= bound if claim.at_most is not None else round(value, _decimals(bound)) == bound
        words.append(REPRODUCED if holds else NOT_REPRODUCED)
        name = "at most" if claim.at_most is not None else "claimed"
        how = "counted" if (claim.metric or "").startswith(COUNTED) else "ours"
        reasons.append(f"{label}: {how} {value:,.{max(2, _decimals(bound))}f}{sign}, {name} {bound:g}{sign}")
    word = next((word for word in (NOT_REPRODUCED, UNTESTABLE) if word in words), REPRODUCED)
    return Verdict(claim, word, tuple(reasons))


def _number(table: Table, claim: Claim, label: str) -> float | None:
    def mean_of(row: str, metric: str | None) -> float | None:
        return statistics.mean(list(table.where(claim.at).values(row, metric).values()))

    value = mean_of(label, claim.metric)
    if claim.per:
        whole, offset = mean_of(label, claim.per), 0.0
    elif claim.relative_to:
        whole, offset = mean_of(claim.relative_to, claim.metric), 1.0
    else:
        return value
    return None if value is None or not whole else 100 * (value / whole - offset)


def _decimals(number: float) -> int:
    return len(f"{number!r}".partition(".")[2].rstrip("0"))
