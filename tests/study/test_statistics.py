from __future__ import annotations

import math

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from basisadapt.study.statistics import difference, equivalence, holm, interval, mean, plateau, std


def test_mean_and_sample_deviation():
    assert mean([2.0, 4.0, 9.0]) == 5.0
    assert std([2.0, 4.0, 9.0]) == pytest.approx(13**0.5)
    assert mean([]) is None
    assert std([1.0]) is None


def test_difference_is_scipys_paired_test_over_the_shared_seeds():
    row = {1: 0.80, 2: 0.85, 3: 0.79, 9: 0.10}
    reference = {3: 0.77, 1: 0.75, 2: 0.84, 8: 0.99}
    ours = difference(row, reference)
    theirs = scipy.stats.ttest_rel([0.80, 0.85, 0.79], [0.75, 0.84, 0.77])
    interval = theirs.confidence_interval(0.95)
    assert ours.n == 3
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def test_difference_by_hand():
    # d = 1, 2, 3: mean 2, std 1, error 1/√3, t(0.975, 2) = 4.302653, so the interval is 2 ± 2.484138.
    ours = difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert (ours.low, ours.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)


def test_difference_of_two_and_of_four_pairs_is_scipys():
    row, reference = [0.80, 0.85, 0.79, 0.91], [0.75, 0.84, 0.77, 0.93]
    for n in (2, 4):
        ours = difference(dict(enumerate(row[:n])), dict(enumerate(reference[:n])))
        theirs = scipy.stats.ttest_rel(row[:n], reference[:n])
        bounds = theirs.confidence_interval(0.95)
        assert (ours.p, ours.low, ours.high) == pytest.approx((theirs.pvalue, bounds.low, bounds.high))


def test_what_cannot_be_tested():
    assert difference({1: 1.0}, {2: 1.0}) is None
    one = difference({1: 1.0}, {1: 0.5})
    assert (one.n, one.mean, one.low, one.p) == (1, 0.5, None, None)
    equal = difference({1: 0.3, 2: 0.4}, {1: 0.2, 2: 0.3})  # 0.1 twice, but for rounding
    assert (equal.low, equal.p) == (None, None)


def test_holm_worked_example():
    # Holm's: sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; never decreasing.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([None]) == [None]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(values):
    adjusted = holm(values)
    for p, q in zip(values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(values) * p)
    assert [q for _, q in sorted(zip(values, adjusted, strict=True))] == sorted(adjusted)


def test_interval_of_a_mean():
    # 2, 4, 9: mean 5, std √13, t(0.975, 2) = 4.302653.
    half = 4.302653 * (13 / 3) ** 0.5
    assert interval([2.0, 4.0, 9.0]) == pytest.approx((5 - half, 5 + half), rel=1e-6)
    assert interval([1.0]) is None
    assert interval([0.1, 0.1]) is None


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_values_that_differ_by_rounding_alone_have_no_interval(size):
    assert interval([size, size * (1 + 4e-13)]) is None
    low, high = interval([size, size * (1 + 1e-10)])
    assert low < size < high


def test_holm_keeps_a_smaller_product_from_overtaking():
    # 4 · 0.0121 = 0.0484 exceeds 3 · 0.0142 = 0.0426, which is raised to it; 2 · 0.0513 = 0.1026; 0.1986.
    assert holm([0.1986, 0.0142, 0.0513, 0.0121]) == pytest.approx([0.1986, 0.0484, 0.1026, 0.0484])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.2))
def test_holm_rejects_what_its_step_down_procedure_rejects(values, level):
    """Holm (1979): in order of p, reject while p ≤ level / (m − k), k = 0, 1, ..., and stop at the first other."""
    rejected = []
    for k, p in enumerate(sorted(values)):
        if p > level / (len(values) - k):
            break
        rejected.append(p)
    close = any(abs(q - level) < 1e-12 for q in holm(values))  # rounding may decide either way
    assert close or sorted(p for p, q in zip(values, holm(values), strict=True) if q <= level) == rejected


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.08])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_equivalence_is_scipys_two_one_sided_tests(margin, n):
    row, reference = [0.80, 0.85, 0.79, 0.91, 0.70], [0.79, 0.86, 0.77, 0.90, 0.71]
    gaps = [a - b for a, b in zip(row[:n], reference[:n], strict=True)]
    above = scipy.stats.ttest_1samp(gaps, -margin, alternative="greater")
    below = scipy.stats.ttest_1samp(gaps, margin, alternative="less")
    found = difference(dict(enumerate(row[:n])), dict(enumerate(reference[:n])))
    ours = equivalence(found, margin)
    assert ours.p == pytest.approx(max(above.pvalue, below.pvalue))
    low, high = scipy.stats.ttest_1samp(gaps, 0.0).confidence_interval(0.90)
    assert ours.half == pytest.approx((high - low) / 2)
    # Both are rejected at 5 % where the 90 % interval lies within the margin.
    assert (ours.p < 0.05) == (-margin < low and high < margin)


def test_equivalence_by_hand():
    # d = 1, 2, 3: mean 2, error 1/√3. Of margin 4, t = 2 √3 with two degrees of freedom: p = (1 − t / √(t² + 2)) / 2.
    found = difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    t = 2 * 3**0.5
    assert equivalence(found, 4.0).p == pytest.approx((1 - t / (t * t + 2) ** 0.5) / 2)
    assert equivalence(found, 2.0).p == pytest.approx(0.5), "at the margin itself"
    assert equivalence(found, 4.0).half == pytest.approx(2.919986 / 3**0.5, rel=1e-6)
    assert equivalence(difference({1: 1.0}, {1: 0.5}), 1.0) is None
    assert equivalence(difference({1: 0.3, 2: 0.4}, {1: 0.2, 2: 0.3}), 1.0) is None


def test_a_plateau_by_hand():
    # From 1 to 2 it rises by 4, so that the last quarter of the octave is within 1; from 2 to 8 it falls by 2.
    found = plateau({1.0: 0.0, 2.0: 4.0, 8.0: 2.0}, 1.0)
    assert (found.octaves, found.open) == (pytest.approx(0.25 + 1.0), False)
    assert plateau({1.0: 3.5, 2.0: 4.0, 8.0: 2.0}, 1.0).open
    assert plateau({1.0: 0.0, 2.0: 4.0, 8.0: 3.0}, 1.0).octaves == pytest.approx(2.25)
    assert plateau({1.0: 0.0, 2.0: 4.0, 4.0: 0.0, 8.0: 4.0}, 1.0).octaves == pytest.approx(0.75), "in two pieces"
    diverged = plateau({1.0: 4.0, 2.0: 4.0, 4.0: -math.inf}, 1.0)
    assert (diverged.octaves, diverged.open) == (1.0, True)
    assert plateau({1.0: 4.0}, 1.0) is plateau({}, 1.0) is None
    assert plateau({1.0: -math.inf, 2.0: -math.inf}, 1.0) is None


curves = st.dictionaries(st.integers(-12, 12), st.floats(-1, 1), min_size=2, max_size=8)


@given(curves, st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_a_plateau_grows_with_the_tolerance_up_to_the_whole_curve(exponents, one, other):
    curve = {2.0**k: y for k, y in exponents.items()}
    small, large = sorted((one, other))
    assert plateau(curve, small).octaves <= plateau(curve, large).octaves + 1e-9
    assert plateau(curve, small).open <= plateau(curve, large).open
    whole = plateau(curve, 3.0)
    assert (whole.octaves, whole.open) == (pytest.approx(max(exponents) - min(exponents)), True)


@given(curves, st.floats(1e-3, 1.0), st.integers(-20, 20), st.floats(-1, 1))
def test_a_plateau_stays_where_rates_are_multiplied_and_scores_moved(exponents, tolerance, octaves, more):
    curve = {2.0**k: y for k, y in exponents.items()}
    moved = {2.0 ** (k + octaves): y for k, y in exponents.items()}
    assert plateau(moved, tolerance) == plateau(curve, tolerance)
    raised = plateau({x: y + more for x, y in curve.items()}, tolerance)
    # At the level itself rounding may decide whether a flat piece belongs to it.
    level = max(curve.values()) - tolerance
    assert min(abs(y - level) for y in curve.values()) < 1e-9 or raised.octaves == pytest.approx(
        plateau(curve, tolerance).octaves, abs=1e-6
    )


@given(curves, st.floats(0.01, 1.0))
def test_a_plateau_is_what_a_fine_grid_counts(exponents, tolerance):
    import numpy as np

    places = sorted(exponents)
    fine = np.linspace(places[0], places[-1], 20_001)
    values = np.interp(fine, places, [exponents[k] for k in places])
    counted = float((values >= max(exponents.values()) - tolerance).mean()) * (places[-1] - places[0])
    ours = plateau({2.0**k: y for k, y in exponents.items()}, tolerance).octaves
    flat = [y for y in exponents.values() if abs(y - (max(exponents.values()) - tolerance)) < 1e-3]
    assert flat or ours == pytest.approx(counted, abs=0.05)
