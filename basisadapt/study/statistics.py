"""Means over seeds, their confidence intervals, paired comparisons (paper, section B.2), and plateaus of curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A row against another over the `n` seeds, or tasks, that they share.

    low, high: the confidence interval of the mean difference; p: of the two-sided paired t-test; error: the standard
    error of the mean. None where they are undefined: for one pair, or where every pair gives the same difference.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    error: float | None = None


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
    from scipy.special import stdtrit

    centre, spread = mean(values), std(values)
    if centre is None or not spread or spread < 1e-12 * abs(centre):
        return None
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * spread / math.sqrt(len(values))
    return centre - half, centre + half


K = TypeVar("K", bound=Hashable)


def difference(row: Mapping[K, float], reference: Mapping[K, float]) -> Difference | None:
    """The paired difference of two mappings from seed (or task) to value; None if they share none."""
    from scipy.special import stdtr

    shared = [row[key] - reference[key] for key in row if key in reference]
    centre, bounds = mean(shared), interval(shared)
    if centre is None:
        return None
    if bounds is None:
        return Difference(len(shared), centre)
    error = (std(shared) or 0.0) / math.sqrt(len(shared))
    p = 2 * float(stdtr(len(shared) - 1, -abs(centre) / error))
    return Difference(len(shared), centre, *bounds, p, error)


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference is smaller than a margin: two one-sided paired t-tests (TOST; Schuirmann, 1987).

    p: the larger of the two, of mean ≤ −margin and of mean ≥ margin. half: half the width of the (1 − 2·0.05)
    confidence interval of the mean; where that lies within the margin, p < 0.05.
    """

    p: float
    half: float


def equivalence(found: Difference, margin: float) -> Equivalence | None:
    """The tests of `found` against ±margin; None where it has no standard error."""
    from scipy.special import stdtr, stdtrit

    if found.error is None:
        return None
    least = (margin - abs(found.mean)) / found.error
    half = float(stdtrit(found.n - 1, CONFIDENCE)) * found.error
    return Equivalence(float(stdtr(found.n - 1, -least)), half)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm, 1979), in the given order; None stays None, uncounted."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Plateau:
    """Where a curve is near its best.

    octaves: the length of the set of x at which the curve lies within the tolerance of its greatest value, in log₂ x.
    open: whether that set reaches an end of the curve, so that the length is a lower bound.
    """

    octaves: float
    open: bool


def plateau(curve: Mapping[float, float], tolerance: float) -> Plateau | None:
    """The plateau of a curve x > 0 to value, straight between its points in log₂ x; None of fewer than two points.

    A value of −∞ (a run that diverged) belongs to no plateau, and nor does what lies between it and its neighbours.
    """
    points = sorted(curve.items())
    level = max(curve.values(), default=-math.inf) - tolerance
    if len(points) < 2 or level == -math.inf:
        return None
    octaves = 0.0
    for (left, low), (right, high) in itertools.pairwise(points):
        low, high = sorted((low, high))
        share = 1.0 if low >= level else 0.0 if high < level or low == -math.inf else (high - level) / (high - low)
        octaves += share * math.log2(right / left)
    return Plateau(octaves, points[0][1] >= level or points[-1][1] >= level)
