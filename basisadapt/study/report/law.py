"""Power laws along an axis of a study: is it the exponent or the constant in which rows differ?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from basisadapt.study import statistics
from basisadapt.study.plan.cells import label_of
from basisadapt.study.report.formats import metric_head
from basisadapt.study.report.table import Line, Table

FULL = 0.99  # of what there is to store; what holds that much follows no law
FEWEST = 3  # points
Fits = Mapping[int, tuple[float, float]]  # seed to exponent and logarithm of the constant


def law_notes(table: Table) -> list[str]:
    """The laws metric = C x^a of the rows that differ in the axis x alone, `StudySpec.law`, and how they differ.

    a and C are those of `statistics.power_law`, seed by seed: their means with 95 % intervals, C's of its logarithms.
    Differences to the reference are paired by seed; the constants' is a quotient. Rows whose mean of `Law.full` is
    above FULL are left out, and so is a law with fewer than FEWEST rows.
    """
    law = table.study.spec.law
    if law is None:
        return []
    groups: dict[str, dict[float, Line]] = {}
    for line in table.lines:
        point = dict(line.row.point)
        if law.axis in point and (law.full is None or (line.mean_of(law.full) or 0.0) <= FULL):
            rest = label_of((axis, value) for axis, value in line.row.point if axis != law.axis)
            groups.setdefault(rest, {})[float(point[law.axis])] = line
    fits = {name: found for name, lines in groups.items() if len(lines) >= FEWEST and (found := _fits(lines))}
    lines = ((name, line) for name, of_group in groups.items() for line in of_group.values())
    references = {line.row.group: name for name, line in lines if line.row.is_reference}
    said = [f"{name}: {_texts(found)}" for name, found in fits.items()]
    for name, found in fits.items():
        first = next(iter(groups[name].values()))
        other = references.get(first.row.group)
        if other in fits and other != name:
            said.append(f"{name} against {other}: {_texts(_between(found, fits[other]), '+', 'times ')}")
    if not said:
        return []
    left_out = "" if law.full is None else f", without rows of more than {FULL:.0%} {metric_head(law.full)}"
    return [f"Laws, {table.headline} = C {law.axis}^a{left_out}: {'; '.join(said)}."]


def _fits(lines: Mapping[float, Line]) -> Fits:
    """The fit of every seed that has a value above 0 in every row."""
    by_seed: dict[int, dict[float, float]] = {}
    for x, line in lines.items():
        for seed, value in line.values.items():
            if value > 0:
                by_seed.setdefault(seed, {})[x] = value
    return {seed: statistics.power_law(curve) for seed, curve in by_seed.items() if len(curve) == len(lines)}


def _between(one: Fits, other: Fits) -> Fits:
    return {seed: (a - other[seed][0], c - other[seed][1]) for seed, (a, c) in one.items() if seed in other}


def _texts(fits: Fits, sign: str = "", before: str = "") -> str:
    """ "a 0.94 [0.90, 0.98], C 560 [540, 580]"."""
    exponents, constants = ([fit[part] for fit in fits.values()] for part in (0, 1))
    a = _text(exponents, lambda x: f"{x:{sign}.2f}")
    return f"a {a}, C {before}{_text(constants, lambda x: f'{math.exp(x):.3g}')}"


def _text(values: list[float], number: Any) -> str:
    bounds = statistics.interval(values)
    interval = "" if bounds is None else f" [{', '.join(map(number, bounds))}]"
    return f"{number(statistics.mean(values))}{interval}"
