from __future__ import annotations

import pytest
from common import SOUND, add, outcomes

from basisadapt.core.errors import InputError
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.claims import Claim
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies
from basisadapt.study.report.table import build_table
from basisadapt.study.report.verdicts import NOT_REPRODUCED, REPRODUCED, UNTESTABLE, judge


@pytest.fixture
def verdicts(folder):
    """The verdicts on claims in YAML, of values of (sinc, fourier, LoRA) × (seeds 1, 2, 3)."""

    def call(claims, values=SOUND, seeds=None, **metrics):
        path = folder / "claiming.yaml"
        path.write_text((folder / "tiny.yaml").read_text() + f"claims:\n{claims}")
        study = resolve(read_spec("claiming.yaml"), seeds=seeds)
        return judge(build_table(study, outcomes(study, values, **metrics)))

    return call


BETTER = "  - {text: Sinc is better, better: sinc, than: fourier}\n"
LORA = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("sinc", "fourier", "word", "reason"),
    [
        # Published: 61.1 − 59.2 = 1.9 points. Differences of 10, 11, 12 points: t = 11 √3, p = 0.003.
        ([0.80, 0.82, 0.84], [0.70, 0.71, 0.72], REPRODUCED, "+11.00 [+8.52, +13.48], p 0.003, published +1.90"),
        ([0.70, 0.71, 0.72], [0.80, 0.82, 0.84], NOT_REPRODUCED, "significantly the other way"),
        # −1, 0, 1 points: 0 ± 2.48 holds both 0 and 1.9.
        ([0.69, 0.70, 0.71], [0.70, 0.70, 0.70], UNTESTABLE, "no power to tell"),
        # A tenth of that: 0 ± 0.25 excludes 1.9.
        ([0.699, 0.700, 0.701], [0.70, 0.70, 0.70], NOT_REPRODUCED, "excludes the published difference"),
        ([0.70, 0.70, 0.70], [0.70, 0.70, 0.70], UNTESTABLE, "the same on every seed"),
        ([None, None, None], [0.70, 0.70, 0.70], UNTESTABLE, "nothing finished of sinc"),
    ],
)
def test_a_row_is_better(verdicts, sinc, fourier, word, reason):
    (verdict,) = verdicts(BETTER, [*sinc, *fourier, *LORA])
    assert verdict.word == word
    assert reason in verdict.because[0]


def test_a_single_task_may_be_an_axis(folder):
    """Labels then end with it; a claim that names rows without it means the same rows, paired by seed."""
    text = (folder / "tiny.yaml").read_text().replace("presets: {", "presets: {gpu: {sweep.task: [docstrings]}, ")
    (folder / "claiming.yaml").write_text(f"{text}claims:\n{BETTER}")
    study = resolve(read_spec("claiming.yaml"), preset="gpu")
    assert study.rows[0].label == "sinc, docstrings"
    (verdict,) = judge(build_table(study, outcomes(study, [0.80, 0.82, 0.84, 0.70, 0.71, 0.72, *LORA])))
    assert verdict.because == ("sinc over fourier: +11.00 [+8.52, +13.48], p 0.003, published +1.90",)


def test_labels_that_are_joined_stand_for_a_sum(verdicts):
    claim = "  - {text: More than twice LoRA, better: sinc + fourier, than: LoRA + LoRA}\n"
    # 0.30 + 0.20, 0.33 + 0.21 and 0.33 + 0.24 above: 53.67 ± 3.51 points, t = 26.46, p = 0.001.
    (verdict,) = verdicts(claim, [0.80, 0.83, 0.83, 0.70, 0.71, 0.74, *LORA])
    assert verdict.word == REPRODUCED
    assert verdict.because == ("sinc + fourier over LoRA + LoRA: +53.67 [+44.94, +62.39], p 0.001",)
    assert verdict.claim.labels == ["sinc", "fourier", "LoRA"]
    (missing,) = verdicts(claim, [0.80, 0.83, 0.83, None, None, None, *LORA])
    assert missing.because == ("sinc + fourier over LoRA + LoRA: nothing finished of fourier",)


def test_one_seed_or_a_missing_row_tells_nothing(verdicts):
    (one,) = verdicts(BETTER, [0.8, 0.7, 0.5], seeds=[1])
    assert (one.word, one.because) == (UNTESTABLE, ("sinc over fourier: +10.00, published +1.90 (one seed)",))
    (missing,) = verdicts("  - {text: Wavelets win, better: morlet, than: sinc}\n")
    assert (missing.word, missing.because) == (UNTESTABLE, ("morlet over sinc: nothing finished of morlet",))


def test_p_values_are_adjusted_over_all_claims(verdicts):
    """t of p = 0.02 is significant alone, and not beside a second test: Holm doubles the smallest."""
    from scipy.stats import t

    half = t.isf(0.01, 2) / 3**0.5  # differences 1 ± e, 1: t = √3 / e
    e = 1 / half
    values = [0.6 + 0.1 * (1 + e), 0.6 + 0.1, 0.6 + 0.1 * (1 - e), 0.6, 0.6, 0.6, 0.5, 0.7, 0.6]
    (alone,) = verdicts(BETTER, values)
    assert (alone.word, "p 0.020" in alone.because[0]) == (REPRODUCED, True)
    first, second = verdicts(BETTER + "  - {text: And LoRA, better: fourier, than: LoRA}\n", values)
    assert (first.word, "p 0.040" in first.because[0]) == (REPRODUCED, True)
    assert second.word == UNTESTABLE
    (both,) = verdicts("  - {text: Best, better: sinc, than: [fourier, LoRA]}\n", values)
    assert both.word == UNTESTABLE  # one of the two differences has no power


def test_increasing_and_counted_numbers(verdicts):
    grows = "  - {text: It grows, increasing: [LoRA, fourier, sinc], metric: METRIC}\n"
    (counted,) = verdicts(grows.replace("METRIC", "parameters.trainable"))
    assert counted.word == NOT_REPRODUCED  # all equal, which counting tells for certain
    (measured,) = verdicts(grows.replace("METRIC", "stable_rank.mean"))
    assert measured.word == UNTESTABLE


def test_what_is_published_stands_beside_what_is_counted(verdicts):
    counts = {"parameters.factors": 8798208.0, "parameters.transfer": 16800.0}
    text = "  - {text: Overhead, rows: sinc, metric: parameters.transfer, per: parameters.factors, BOUND}\n"
    (impossible,) = verdicts(text.replace("BOUND", "equals: 0.95"), **counts)
    assert impossible.word == NOT_REPRODUCED
    assert impossible.because == ("sinc: counted 0.19 %, claimed 0.95 %",)
    (rounded,) = verdicts(text.replace("BOUND", "equals: 0.2"), **counts)
    assert rounded.word == REPRODUCED  # 0.19095, printed with one decimal
    (bounded,) = verdicts(text.replace("BOUND", "at_most: 1"), **counts)
    assert bounded.word == REPRODUCED
    relative = "  - {text: As many, rows: [sinc, fourier], metric: M, relative_to: LoRA, equals: 0}\n"
    assert verdicts(relative.replace("M", "parameters.trainable"))[0].word == REPRODUCED
    assert verdicts(relative.replace("M", "parameters.none"))[0].word == UNTESTABLE


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"better": "sinc"},
        {"increasing": ["sinc"]},
        {"rows": "sinc", "at_most": 1.0},
        {"rows": "sinc", "metric": "m", "at_most": 1.0, "equals": 1.0},
        {"better": "sinc", "than": "LoRA", "increasing": ["a", "b"]},
        {"better": "sinc", "than": "LoRA", "per": "m"},
    ],
)
def test_a_claim_has_exactly_one_form(fields):
    with pytest.raises(InputError, match="claim 'x'"):
        Claim(text="x", **fields)


def test_bad_claims_name_their_file(folder):
    add(folder, "claims: [{text: x, bettter: sinc}]\n")
    with pytest.raises(InputError, match=r"tiny.yaml.*did you mean 'claims\[0\].better'"):
        read_spec("tiny.yaml")


@pytest.mark.parametrize("name", list_studies())
def test_the_claims_of_shipped_studies_name_rows_that_exist(name):
    spec = read_spec(name)
    rows = [row for preset in ("quick", *spec.presets) for row in resolve(spec, preset=preset).rows]
    known = {row.label for row in rows} | {row.name for row in rows}
    for claim in spec.claims:
        assert set(claim.labels) <= known, claim.text
