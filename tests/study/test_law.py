"""Power laws along an axis: exponents and constants of rows, and how they differ from the reference's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from common import outcome

from basisadapt import InputError
from basisadapt.study import statistics
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.report import report, text
from basisadapt.study.report.table import build_table

STUDY = """
title: A law
question: Which is it?
base: {task: facts, backbone: minilm}
sweep: {method: [lora, phi], r: [1, 2, 4, 8]}
beside: [{label: other, set: {method: hira}}]
reference: method=lora
seeds: [1, 2]
law: {axis: r, full: recall}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "law.yaml").write_text(STUDY)
    return resolve(read_spec(str(tmp_path / "law.yaml")))


def notes(study, bits, recall=lambda config: 0.5, seeds=(1, 2)):
    """The notes on laws, if a run stores bits(configuration)."""
    cells = [cell for cell in study.cells if cell.seed in seeds]
    known = {c.key: outcome(c, bits(c.config), headline="bits", recall=recall(c.config)) for c in cells}
    printed = text.to_markdown(report.make_report(build_table(study, known)))
    return [line.removeprefix("- ") for line in printed.splitlines() if line.startswith("- Laws")]


def test_least_squares_of_logarithms():
    generator = np.random.default_rng(0)
    x, y = np.array([1.0, 2.0, 5.0, 8.0]), generator.uniform(1, 9, size=4)
    exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
    found = statistics.power_law(dict(zip(x.tolist(), y.tolist(), strict=True)))
    assert found == pytest.approx((exponent, constant))
    assert statistics.power_law({1.0: 3.0, 4.0: 6.0}) == pytest.approx((0.5, math.log(3)))


def test_a_law_and_its_difference_to_the_reference(study):
    """bits = 100 r^1.2 and 300 r^0.8, times 0.9 and 1.1 by seed, which only the constants show."""

    def bits(config):
        constant, exponent = (300, 0.8) if config.method == "phi" else (100, 1.2)
        return (0.9, 1.1)[config.seed - 1] * constant * config.adapter.r**exponent

    (note,) = notes(study, bits)
    # ln 0.9 and ln 1.1: mean ln 0.995, t(1) = 12.706, std / √2 = 0.1003.
    low, high = (0.99**0.5 * math.exp(sign * 12.7062 * math.log(1.1 / 0.9) / 2) for sign in (-1, 1))
    assert note == (
        "Laws, bits = C r^a, without rows of more than 99% recall: "
        f"lora: a 1.20, C 99.5 [{100 * low:.3g}, {100 * high:.3g}]; "
        f"phi: a 0.80, C 298 [{300 * low:.3g}, {300 * high:.3g}]; phi against lora: a -0.40, C times 3."
    )


def test_rows_that_hold_everything_follow_no_law(study):
    """Without them the others' exponent is 1; with two rows left there is no law."""
    (note,) = notes(study, lambda c: 10.0 * min(c.adapter.r, 4), lambda c: float(c.adapter.r == 8))
    assert "lora: a 1.00, C 10; phi: a 1.00, C 10; phi against lora: a +0.00, C times 1." in note
    assert notes(study, lambda c: 10.0 * c.adapter.r, lambda c: float(c.adapter.r > 2)) == []
    (note,) = notes(study, lambda c: 10.0 * c.adapter.r, lambda c: float(c.method == "lora"))
    assert note.endswith("recall: phi: a 1.00, C 10."), "the reference has none"


def test_what_is_missing_leaves_no_law(study):
    assert notes(study, lambda c: 10.0 * c.adapter.r, seeds=()) == []
    assert notes(study, lambda c: 10.0 * c.adapter.r if c.adapter.r < 8 else -1.0) == []


def test_a_study_without_a_law_fits_none(study, tmp_path):
    (tmp_path / "without.yaml").write_text(STUDY.replace("law: {axis: r, full: recall}", ""))
    assert notes(resolve(read_spec(str(tmp_path / "without.yaml"))), lambda c: 1.0) == []
    (tmp_path / "wrong.yaml").write_text(STUDY.replace("axis: r", "axes: r"))
    with pytest.raises(InputError, match=r"law.axes.*did you mean 'law.axis'"):
        read_spec(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize(
    "drawn", ["law: {axis: rank}", "lines: {along: rank}", "map: {x: rank, y: r}", "map: {x: r, y: rank}"]
)
def test_an_axis_that_is_no_setting_is_refused(study, tmp_path, drawn):
    (tmp_path / "wrong.yaml").write_text(STUDY.replace("law: {axis: r, full: recall}", drawn))
    with pytest.raises(InputError, match=r"unknown key 'rank'; did you mean 'adapter.r'"):
        resolve(read_spec(str(tmp_path / "wrong.yaml")))


def test_capacity_asks_for_the_law_of_memory():
    law = read_spec("capacity").law
    assert (law.axis, law.full) == ("r", "recall")
