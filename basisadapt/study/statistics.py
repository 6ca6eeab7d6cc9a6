"""Means over seeds, their confidence intervals, and paired comparisons (paper, section B.2)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A row against another over the `n` seeds, or tasks, that they share.

    low, high: the confidence interval of the mean difference; p: of the two-sided paired t-test. None where
    they are undefined: for one pair, or where every pair gives the same difference.
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


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The confidence interval of the mean, mean ± t(n − 1) std / √n; None of fewer than two different values."""
    from scipy.stats import t

    centre, spread = mean(values), std(values)
    if centre is None or not spread or spread < 1e-12 * abs(centre):
        return None
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return centre - half, centre + half


K = TypeVar("K", bound=Hashable)


def difference(row: Mapping[K, float], reference: Mapping[K, float]) -> Difference | None:
    """The paired difference of two mappings from seed (or task) to value; None if they share none."""
    from scipy.stats import t

    shared = [row[key] - reference[key] for key in row if key in reference]
    centre, bounds = mean(shared), interval(shared)
    if centre is None:
        return None
    if bounds is None:
        return Difference(len(shared), centre)
    error = (std(shared) or 0.0) / math.sqrt(len(shared))
    p = 2 * float(t.sf(abs(centre) / error, len(shared) - 1))
    return Difference(len(shared), centre, *bounds, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm, 1979), in the given order; None stays None, uncounted."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted
