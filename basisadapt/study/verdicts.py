"""What the record says of the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from basisadapt.study import statistics
from basisadapt.study.claims import Claim, listed, summed

if TYPE_CHECKING:
    from basisadapt.study.statistics import Difference
    from basisadapt.study.table import Table

REPRODUCED, NOT_REPRODUCED, UNTESTABLE = "reproduced", "not reproduced", "not testable here"
LEVEL = 0.05  # of the family of all tests behind a study's claims (paper, section B.2)
COUNTED = "parameters."  # metrics that are counted, not measured: they have no error, and one seed is enough


@dataclass(frozen=True)
class Verdict:
    """A claim, one of the three words, and the numbers behind it."""

    claim: Claim
    word: str
    because: tuple[str, ...]


def judge(table: Table) -> tuple[Verdict, ...]:
    """A verdict on each of the study's claims; p-values are adjusted over all of their tests together (Holm)."""
    claims = table.study.spec.claims
    found = [[_difference(table, claim, pair) for pair in claim.pairs] for claim in claims]
    adjusted = iter(statistics.holm([d.p if d else None for differences in found for d in differences]))
    verdicts = []
    for claim, differences in zip(claims, found, strict=True):
        p_values = [next(adjusted) for _ in differences]
        verdicts.append(_compared(table, claim, differences, p_values) if differences else _counted(table, claim))
    return tuple(verdicts)


def _difference(table: Table, claim: Claim, pair: tuple[str, str]) -> Difference | None:
    more, less = (_values(table, label, claim.metric) for label in pair)
    return statistics.difference(more, less)


def _values(table: Table, label: str, metric: str | None) -> dict[Any, float]:
    """Seed or task to the value of a row, or to the sum of several, where all of them have one."""
    rows = [{**table.values(part, metric)} for part in summed(label)]
    return {key: sum(row[key] for row in rows) for key in rows[0] if all(key in row for row in rows)}


def _compared(
    table: Table, claim: Claim, differences: Sequence[Difference | None], p_values: Sequence[float | None]
) -> Verdict:
    words, reasons = [], []
    for pair, difference, p in zip(claim.pairs, differences, p_values, strict=True):
        published = _published_difference(table, pair) if _scale(table, claim) == 100 else None
        word, why = _word(claim, difference, p, published, _scale(table, claim))
        words.append(word)
        reasons.append(f"{pair[0]} over {pair[1]}: {_shown(table, claim, pair, difference, p, published)}{why}")
    if NOT_REPRODUCED in words:
        return Verdict(claim, NOT_REPRODUCED, tuple(reasons))
    return Verdict(claim, UNTESTABLE if UNTESTABLE in words else REPRODUCED, tuple(reasons))


def _word(
    claim: Claim, difference: Difference | None, p: float | None, published: float | None, scale: float
) -> tuple[str, str]:
    """The word for one pair, and why where the numbers do not say it."""
    if difference is None:
        return UNTESTABLE, ""
    if (claim.metric or "").startswith(COUNTED):
        return (REPRODUCED if difference.mean > 0 else NOT_REPRODUCED), " (counted)"
    if difference.low is None or difference.high is None or p is None:
        return UNTESTABLE, " (one seed)" if difference.n == 1 else " (the same on every seed)"
    if p < LEVEL:
        return (REPRODUCED, "") if difference.mean > 0 else (NOT_REPRODUCED, ": significantly the other way")
    if published is not None and difference.high * scale < published and published > 0:
        return NOT_REPRODUCED, ": the interval excludes the published difference"
    return UNTESTABLE, ": no power to tell" + (" it from zero" if published is None else "")


def _shown(
    table: Table,
    claim: Claim,
    pair: tuple[str, str],
    difference: Difference | None,
    p: float | None,
    published: float | None,
) -> str:
    if difference is None:
        missing = [part for label in pair for part in summed(label) if not table.values(part, claim.metric)]
        return f"nothing finished of {' and '.join(missing)}" if missing else "no seed in common"
    scale, form = _scale(table, claim), "+.2f" if _scale(table, claim) == 100 else "+.4g"
    text = format(difference.mean * scale, form)
    if difference.low is not None and difference.high is not None:
        text += f" [{format(difference.low * scale, form)}, {format(difference.high * scale, form)}]"
    if p is not None:
        text += ", p < 0.001" if p < 0.001 else f", p {p:.3f}"
    return text if published is None else f"{text}, published {published:+.2f}"


def _scale(table: Table, claim: Claim) -> float:
    return 100 if table.percent and claim.metric is None else 1


def _published_difference(table: Table, pair: tuple[str, str]) -> float | None:
    try:
        more, less = (sum(float(table.published(part) or "") for part in summed(label)) for label in pair)
        return more - less
    except ValueError:  # not printed for one of the two
        return None


def _counted(table: Table, claim: Claim) -> Verdict:
    """The verdict on a number by itself."""
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
        return statistics.mean(list(table.values(row, metric).values()))

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
