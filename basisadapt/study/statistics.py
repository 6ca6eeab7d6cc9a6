"""Means over seeds, and paired comparisons with a reference row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A row against the reference over the `n` seeds they share.

    low, high: the confidence interval of the mean difference; p: of the two-sided paired t-test. None where
    they are undefined: for one seed, or where every seed gives the same difference.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n − 1); None of fewer than two values."""
    centre = mean(values)
    if centre is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def difference(row: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The paired difference of two mappings from seed to value; None if they share no seed."""
    from scipy.stats import t

    shared = [row[seed] - reference[seed] for seed in sorted(row.keys() & reference.keys())]
    n, centre, spread = len(shared), mean(shared), std(shared)
    if centre is None:
        return None
    if not spread or spread < 1e-12 * abs(centre):
        return Difference(n, centre)
    error = spread / math.sqrt(n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(centre) / error, n - 1))
    return Difference(n, centre, centre - half, centre + half, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm, 1979), in the given order; None stays None, uncounted."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted
