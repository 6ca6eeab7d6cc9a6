"""Means over seeds, confidence intervals, paired tests (paper, section B.2), and plateaus of curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The paired difference of two rows, in the metric's unit.

    n: the number of seeds, or tasks, that both rows have.
    mean: the mean difference.
    low, high: its 95 % confidence interval.
    p: the p-value of the two-sided paired t-test.
    error: the standard error of the mean, std / √n.

    low, high, p and error are None for one pair, and if all pairs have the same difference.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    error: float | None = None


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None for no values."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """The sample standard deviation, √(Σ (x − mean)² / (n − 1)); None for fewer than two values."""
    centre = mean(values)
    if centre is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean, mean ± t(n − 1) std / √n; None for fewer than two distinct values."""
    from scipy.special import stdtrit

    centre, spread = mean(values), std(values)
    if centre is None or not spread or spread < 1e-12 * abs(centre):
        return None
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * spread / math.sqrt(len(values))
    return centre - half, centre + half


K = TypeVar("K", bound=Hashable)


def difference(row: Mapping[K, float], reference: Mapping[K, float]) -> Difference | None:
    """The paired difference of two mappings from seed, or task, to value; None if they share no key."""
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
    """Two one-sided paired t-tests of |difference| < margin (TOST). Source: Schuirmann (1987).

    p: the larger p-value of the two null hypotheses mean ≤ −margin and mean ≥ margin.
    half: half the width of the 90 % confidence interval of the mean. If the interval lies within ±margin, p < 0.05.
    """

    p: float
    half: float


def equivalence(found: Difference, margin: float) -> Equivalence | None:
    """Test `found` against ±margin, in its unit; None if it has no standard error."""
    from scipy.special import stdtr, stdtrit

    if found.error is None:
        return None
    least = (margin - abs(found.mean)) / found.error
    half = float(stdtrit(found.n - 1, CONFIDENCE)) * found.error
    return Equivalence(float(stdtr(found.n - 1, -least)), half)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for multiple tests, in their order; None stays None, not counted. Source: Holm (1979)."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Plateau:
    """The x at which a curve is within a tolerance of its maximum.

    octaves: the length of this set in log₂ x.
    open: whether the set includes an end of the curve; the length is then a lower bound.
    """

    octaves: float
    open: bool


def plateau(curve: Mapping[float, float], tolerance: float) -> Plateau | None:
    """The plateau of a curve from x > 0 to value, linear in log₂ x between its points; None for fewer than two points.

    A value of −∞, of a diverged run, excludes its point and the two segments that meet there.
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


def power_law(curve: Mapping[float, float]) -> tuple[float, float]:
    """a and log C of y = C x^a, by least squares of log y on log x. curve: x > 0 to y > 0, for two or more x."""
    points = [(math.log(x), math.log(y)) for x, y in curve.items()]
    middle, level = (math.fsum(values) / len(points) for values in zip(*points, strict=True))
    spread = math.fsum((x - middle) ** 2 for x, _ in points)
    exponent = math.fsum((x - middle) * (y - level) for x, y in points) / spread
    return exponent, level - exponent * middle
