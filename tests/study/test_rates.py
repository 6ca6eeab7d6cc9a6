"""Rows at a value of the tuned setting beside their own, curves and plateaus, variants, and claims on them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from pathlib import Path

import pytest
import yaml
from common import no_pictures, outcome

from basisadapt.core.errors import InputError
from basisadapt.study.plan.cells import Cell, resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.study.report import figures, text
from basisadapt.study.report.files import report_files
from basisadapt.study.report.report import make_report
from basisadapt.study.report.table import tuned_table
from basisadapt.study.report.text_tables import text_tables
from basisadapt.study.report.verdicts import NOT_REPRODUCED, REPRODUCED, UNTESTABLE
from basisadapt.training.config import RunConfig

RATES = [1e-3, 2e-3, 4e-3, 8e-3]
STUDY = {
    "title": "Rates",
    "question": "Which?",
    "base": {"task": "docstrings", "backbone": "minilm", "method": "phi", "train": {"max_steps": 5}},
    "sweep": {"variant": ["LoRA", "wide"], "r": [1, 4]},
    "given": {"variant=LoRA": {"method": "lora"}, "variant=wide": {"gain": 100, "omega_init": "nyquist"}},
    "reference": "variant=LoRA",
    "seeds": [1, 2, 3],
    "tune": {"grid": {"train.lr": RATES}, "seeds": [7], "validation": 0.2, "at": "all", "common": 1e-3},
    "presets": {"smoke": {"seeds": [1]}},
}


@pytest.fixture
def write(folder):
    """Writes rates.yaml, STUDY with other parts, of which None takes one away; returns the spec."""

    def call(**parts):
        whole = {key: value for key, value in {**STUDY, **parts}.items() if value is not None}
        (folder / "rates.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        return read_spec("rates.yaml")

    return call


def rule(**parts):
    return {**STUDY["tune"], **parts}


def score(config):
    """LoRA is best at 4e-3 and loses 2 points an octave; the other is within a point of its best at every rate."""
    octaves = abs(math.log2(config.train.lr / 4e-3))
    best = 0.5 if config.method == "lora" else 0.505
    return best - (0.02 if config.method == "lora" else 0.003) * octaves + config.seed / 1000


def report_of(spec, score, preset="quick"):
    """The report of a study all of whose cells have finished with a score, or diverged where it is None."""
    tuning = resolve_tuning(spec, preset=preset)
    values = {cell.key: (cell, score(cell.config)) for cell in tuning.possible_cells}
    known = {
        key: outcome(cell, value, status="finished" if value is not None else "diverged")
        for key, (cell, value) in values.items()
    }
    tuned = tuning.choose(known)
    return make_report(tuned_table(tuned, known), tuned=tuned)


def test_a_variant_sets_what_is_given_for_it(write):
    spec = write()
    rows = {row.label: row.cells[0].settings for row in resolve(spec, changes=["gain=3"]).rows}
    assert list(rows) == ["LoRA, 1", "LoRA, 4", "wide, 1", "wide, 4"]
    assert {label: found["method"] for label, found in rows.items()} == {
        "LoRA, 1": "lora",
        "LoRA, 4": "lora",
        "wide, 1": "phi",
        "wide, 4": "phi",
    }
    wide = rows["wide, 4"]
    assert (wide["adapter.r"], wide["adapter.omega_init"]) == (4, "nyquist")
    assert wide["adapter.gain"] == 100, "over the command line, as every axis"
    groups = {row.label: (row.group, row.is_reference) for row in resolve(spec).rows}
    assert groups["LoRA, 4"] == (("docstrings", 4), True)
    assert groups["wide, 4"] == (("docstrings", 4), False)
    changed = resolve(spec, changes=["sweep.variant=LoRA,dora"]).rows
    assert [row.cells[0].config.method for row in changed] == ["lora", "lora", "dora", "dora"], "a method by its name"


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ({"sweep": {"variant": ["LoRA", "wid"]}}, [], "unknown variant 'wid'; did you mean 'wide'"),
        ({}, ["sweep.variant=wode"], "unknown variant 'wode'; did you mean 'wide'"),
        ({}, ["variant=wide"], "unknown key 'variant'"),
        ({}, ["sweep.gain=1,2"], "variant 'wide' sets adapter.gain, which is an axis of its own"),
        ({"reference": "variant=lora"}, [], "unknown reference row 'variant=lora'"),
    ],
)
def test_bad_variants(write, parts, changes, message):
    with pytest.raises(InputError, match=message):
        resolve(write(**parts), changes=changes)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"tune": rule(at="al")}, "tune.at must be a list of numbers or all, got 'al'"),
        ({"tune": rule(at=[0.0])}, "must be numbers above 0, got 0.0"),
        ({"tune": rule(at=None, common=-1)}, "must be numbers above 0, got -1.0"),
        ({"tune": rule(grid={"train.lr": RATES, "gain": [1, 2]})}, "need one tuned setting, got train.lr, gain"),
        ({"tune": rule(grid={"omega_init": ["nyquist", 1]})}, "must be numbers above 0, got 'nyquist'"),
        ({"presets": {"quick": {"tune.att": [1]}}}, "unknown key 'att'"),
        ({"presets": {"quick": {"tune.common": "x"}}}, "tune.common must be a number"),
        (
            {"tune": rule(at=None, common=None), "claims": [{"at": 1e-3}]},
            "at 0.001, which needs tune.at or tune.common",
        ),
        ({"tune": rule(common=None), "claims": [{"at": "common"}]}, "at common, which needs tune.common"),
        ({"tune": None, "claims": [{"at": "common"}]}, "at common, which needs tune.common"),
        ({"tune": rule(at=None), "claims": [{"metric": "plateau"}]}, "on a plateau, which needs tune.at"),
        ({"claims": [{"metric": "plateau", "at": "common"}]}, "a plateau is of the whole curve and has no at"),
        ({"claims": [{"at": "commn"}]}, "at must be a number or common, got 'commn'"),
    ],
)
def test_bad_rules_and_claims_on_values(write, parts, message):
    claims = [{"text": "x", "better": "wide, 1", "than": "LoRA, 1", **claim} for claim in parts.get("claims", [])]
    with pytest.raises(InputError, match=message):
        resolve_tuning(write(**{**parts, "claims": claims or None}))


def test_the_same_cells_are_run_once(write):
    tuning = resolve_tuning(write())
    assert list(tuning.at) == RATES
    grid = {cell.key for candidates in tuning.candidates for one in candidates for cell in one.row.cells}
    assert {cell.key for row in tuning.rows_at for cell in row.cells} == grid, "what is chosen is a part of the curve"
    known = {cell.key: outcome(cell, score(cell.config)) for cell in tuning.trials}
    cells = tuning.choose(known).cells
    assert len(cells) == len({cell.key for cell in cells}) == 4 * 4 + 4 * 4 * 3
    assert "LoRA, 4, train.lr=0.002" in {cell.row for cell in cells}
    one = resolve_tuning(write(tune=rule(at=[3e-3], common=None)))
    assert list(one.at) == [3e-3], "which need not be in the grid"
    assert len(one.choose(known).cells) == 4 * 4 + 4 * 3 + 4 * 3
    assert not {row.label for row in one.choose({}).chosen.rows} ^ {row.label for row in one.at[3e-3]}


def test_a_preset_and_the_command_line_replace_the_rule(write):
    spec = write(presets={"gpu": {"tune.at": [2e-3], "tune.common": 8e-3, "tune.seeds": [9], "tune.validation": 0.1}})
    tuning = resolve_tuning(spec, preset="gpu", changes=["tune.common=4e-3"])
    assert list(tuning.at) == [2e-3, 4e-3]
    assert {(cell.seed, cell.config.train.validation) for cell in tuning.trials} == {(9, 0.1)}
    assert resolve_tuning(spec, preset="gpu").spec.tune.common == 8e-3


def test_a_run_fills_both_tables(home, fake, drawn_reports, study, write):
    write(sweep={"variant": ["LoRA", "wide"], "r": [4]}, seeds=[1, 2])
    fake.score = score
    code, out, err = study("rates.yaml", "--output", "results")
    assert (code, len(fake.ran)) == (0, 2 * 4 + 2 * 4 * 2)
    again, repeated, _ = study("--report", "rates.yaml")
    assert (again, len(fake.ran)) == (0, 24)
    assert out.split("\nRecorded in")[0] == repeated.split("\nRecorded in")[0]
    assert "LoRA, 4, train.lr=0.001, seed 1: accuracy 0.4610" in err
    assert (home / "results" / "curves.png").stat().st_size > 0
    assert "<h2>Over train.lr</h2>" in (home / "results" / "report.html").read_text(encoding="utf-8")
    assert (home / "results" / "over_train.lr.csv").exists()
    code, printed, _ = study("--report", "rates.yaml", "--json")
    found = json.loads(printed)
    assert [one["value"] for one in found["at"]] == RATES
    own, same = found["rows"][0], found["at"][0]["rows"][0]
    assert (own["label"], own["mean"]) == ("LoRA, 4", pytest.approx(0.5015))
    assert (same["label"], same["mean"]) == ("LoRA, 4", pytest.approx(0.4615))
    assert found["at"][0]["rows"][1]["difference"]["mean"] == pytest.approx(0.039)
    assert own["plateau"]["octaves"] == pytest.approx(1.0)
    assert not own["plateau"]["open"]


def test_what_is_shown_beside(write):
    found = report_of(write(), score)
    main, curves, tuning = text_tables(found)
    assert main.header[1:5] == ["accuracy, %", "seeds", "difference to variant=LoRA (95 % CI)", "p (Holm)"]
    assert main.header[5:9] == [
        "accuracy, % at train.lr=0.001",
        "seeds at 0.001",
        "difference to variant=LoRA (95 % CI) at 0.001",
        "p (Holm) at 0.001",
    ]
    assert main.rows[0][:6] == ["LoRA, 1", "50.20 ± 0.10", "3", "-", "-", "46.20 ± 0.10"]
    assert main.rows[2][3].startswith("+0.50")
    assert main.rows[2][7].startswith("+3.90")
    assert (curves.title, tuning.title) == ("Over train.lr", "Tuning")
    # LoRA loses a point in half an octave on either side of its best; the other reaches both ends.
    assert curves.rows[0] == ["LoRA, 1", "46.20 ± 0.10", "48.20 ± 0.10", "50.20 ± 0.10", "48.20 ± 0.10", "1.00", "1.00"]
    assert curves.rows[2][-2] == "≥ 3.00"
    assert "| accuracy, % at train.lr=0.001 |" in text.to_markdown(found)
    rows = list(csv.DictReader(io.StringIO(text.to_csv(found.table))))
    assert len(rows) == 4 + 4 * 4
    assert [row["at"] for row in rows if row["row"] == "LoRA, 1"] == ["", *map(str, RATES)]
    assert float(rows[0]["plateau_octaves"]) == pytest.approx(1.0)
    few = report_of(write(tune=rule(at=[2e-3, 8e-3], common=None)), score)
    heads = text_tables(few)[0].header
    assert [head for head in heads if " at train.lr" in head] == [
        "accuracy, % at train.lr=0.002",
        "accuracy, % at train.lr=0.008",
    ]
    only = report_of(write(tune=rule(grid={"train.lr": [1e-3]})), score)
    assert not any(" at " in head for head in text_tables(only)[0].header), "it would be the same once more"


def test_over_several_tasks(write):
    found = report_of(write(sweep={"task": ["glue/cola", "glue/rte"], **STUDY["sweep"]}), score)
    (across,) = (grid for grid in text_tables(found) if grid.title == "Over all tasks")
    assert across.header[6] == "accuracy, % at train.lr=0.001"
    assert len(across.header) == len(across.rows[0]) == 1 + 2 * 5
    assert found.table.values("LoRA, 1", "plateau") == {"glue/cola": pytest.approx(1), "glue/rte": pytest.approx(1)}


def test_where_a_run_diverged_or_is_missing_there_is_no_plateau(write):
    def one_diverged(config):
        return None if (config.method, config.train.lr, config.seed) == ("phi", 8e-3, 1) else score(config)

    found = report_of(write(), one_diverged)
    wide = found.table.lines[2]
    plateau = found.table.plateau(wide)
    assert plateau.octaves == pytest.approx(2.0), "of the mean curve to 4e-3, beyond which a seed diverged"
    assert plateau.by_seed == pytest.approx({1: 2.0, 2: 3.0, 3: 3.0})
    assert found.has_failures
    assert "Diverged: wide, 1, train.lr=0.008 seed 1." in text.to_text(found)
    tuning = resolve_tuning(write())
    known = {
        c.key: outcome(c, score(c.config)) for c in tuning.possible_cells if c.seed != 3 or c.config.train.lr < 8e-3
    }
    table = tuned_table(tuning.choose(known), known)
    assert set(table.plateau(table.lines[0]).by_seed) == {1, 2}
    assert "Not run: 4 of 48 cells." in text.to_text(make_report(table))
    untuned = {
        c.key: outcome(c, score(c.config)) for c in tuning.possible_cells if c.config.train.lr == 1e-3 and c.seed != 7
    }
    counted = text.to_text(make_report(tuned_table(tuning.choose(untuned), untuned)))
    assert "Not run: 36 of 48 cells." in counted, "a row without a choice runs at the common rate all the same"
    nothing = tuned_table(tuning.choose({}), {})
    assert nothing.plateau(nothing.lines[0]) is None


def test_the_curves_have_a_panel_for_each_group(write):
    found = report_of(write(), score)
    assert report_files(found, no_pictures)["curves.png"].startswith(b"\x89PNG")
    figure = figures.curves_figure(found.table)
    assert [axes.get_title() for axes in figure.axes] == ["r = 1", "r = 4"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert list(lines) == ["LoRA", "wide"]
        assert list(lines["LoRA"].get_xdata()) == RATES
        assert list(lines["LoRA"].get_ydata()) == pytest.approx([46.2, 48.2, 50.2, 48.2])
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in dashed] == [1e-3]
        rings = [line.get_xdata()[0] for line in axes.lines if line.get_fillstyle() == "none"]
        assert rings == [4e-3, 4e-3]
        low, high = axes.collections[0].get_datalim(axes.transData).intervaly
        assert len(axes.collections) == 2, "a band each"
        assert (low, high) == pytest.approx((46.1, 50.3)), "one standard deviation"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "wide"]
    tasks = write(sweep={"task": ["glue/cola", "glue/rte"], "variant": ["LoRA", "wide"], "r": [4]}, reference=None)
    figure = figures.curves_figure(report_of(tasks, score).table)
    assert [axes.get_title() for axes in figure.axes] == ["glue/cola", "glue/rte"]


def verdicts_of(write, score, **claim):
    whole = {"text": "x", **claim}
    return report_of(write(claims=[whole]), score).verdicts[0]


def noisy(config):
    """The seeds of the two rows differ by 1 and 0 and −1 tenths of a point beside their difference."""
    return score(config) + (config.method == "phi") * {1: 0.001, 2: 0.0, 3: -0.001, 7: 0.0}[config.seed]


def test_claims_on_a_value_and_on_the_own_choice(write):
    pair = {"better": "wide, 4", "than": "LoRA, 4"}
    at = verdicts_of(write, noisy, **pair, at="common")
    # 3.9 ± t(0.975, 2) · 0.1 / √3 = 0.25.
    assert (at.word, at.because) == (
        REPRODUCED,
        ("wide, 4 over LoRA, 4 at train.lr=0.001: +3.90 [+3.65, +4.15], p < 0.001",),
    )
    assert verdicts_of(write, noisy, **pair, at=1e-3).because == at.because
    own = verdicts_of(write, noisy, **pair)
    assert own.because[0].startswith("wide, 4 over LoRA, 4: +0.50 [+0.25, +0.75]")
    nowhere = verdicts_of(write, noisy, **pair, at=5e-3)
    assert nowhere.word == UNTESTABLE
    assert nowhere.because[0].endswith("at train.lr=0.005: nothing finished of wide, 4 and LoRA, 4")


def test_a_better_claim_without_power_says_what_could_have_been_seen(write):
    verdict = verdicts_of(write, lambda c: noisy(c) - 0.005 * (c.method == "phi"), better="wide, 4", than="LoRA, 4")
    assert verdict.word == UNTESTABLE
    assert verdict.because[0].endswith("no power to tell it from zero; a difference of 0.25 could have been seen")


@pytest.mark.parametrize(
    ("margin", "word", "reason"),
    [
        # 0.5 points, standard error 0.1 / √3; half of the 90 % interval t(0.95, 2) · 0.0577 = 0.17.
        (1, REPRODUCED, ", margin 1, p 0.007, 90 % interval ± 0.17, within any margin above 0.67"),
        (0.6, UNTESTABLE, ", 90 % interval ± 0.17, within any margin above 0.67: no power to tell"),
        (0.2, NOT_REPRODUCED, "above 0.67: the interval lies beyond the margin"),
    ],
)
def test_rows_that_are_claimed_to_be_equal(write, margin, word, reason):
    verdict = verdicts_of(write, noisy, equal="wide, 4", to="LoRA, 4", margin=margin)
    assert verdict.word == word
    assert verdict.because[0].startswith("wide, 4 to LoRA, 4: +0.50 [+0.25, +0.75], margin ")
    assert verdict.because[0].endswith(reason)


def test_equivalence_tests_are_adjusted_with_the_others_and_need_seeds(write):
    equal = {"text": "x", "equal": ["wide, 1", "wide, 4"], "to": "LoRA, 4", "margin": 1}
    better = {"text": "y", "better": "wide, 4", "than": "LoRA, 4"}
    first, _ = report_of(write(claims=[equal, better]), noisy).verdicts
    assert first.word == REPRODUCED
    assert [", p 0.020" in reason for reason in first.because] == [True, True], "0.0066 thrice"
    (one,) = report_of(write(claims=[equal]), noisy, preset="smoke").verdicts
    assert (one.word, one.because[0]) == (UNTESTABLE, "wide, 1 to LoRA, 4: +0.60, margin 1 (one seed)")
    (same,) = report_of(write(claims=[equal]), score).verdicts
    assert (same.word, same.because[0].endswith("(the same on every seed)")) == (UNTESTABLE, True)


def narrow(config):
    """As `score`, LoRA's width differing by seed; the other's falls off at the ends, so that its plateau is closed."""
    octaves = abs(math.log2(config.train.lr / 4e-3))
    if config.method == "lora":
        return 0.5 - octaves * (0.02 + config.seed / 1000)
    return 0.5 - (0.1 if config.train.lr in (RATES[0], RATES[-1]) else 0.003 * octaves)


def test_a_plateau_is_compared_by_seed(write):
    pair = {"better": "wide, 4", "than": "LoRA, 4", "metric": "plateau"}
    verdict = verdicts_of(write, narrow, **pair)
    assert (verdict.word, verdict.because[0].startswith("wide, 4 over LoRA, 4: +0.")) == (REPRODUCED, True)

    def other_way(config):
        """LoRA's plateau is the narrower, but reaches an end of the grid."""
        if config.method == "lora":
            return 0.5 - 0.02 * math.log2(8e-3 / config.train.lr) - config.seed / 1000
        return narrow(config) + config.seed / 1000 * (config.train.lr == 2e-3)

    verdict = verdicts_of(write, other_way, **pair)
    assert verdict.word == UNTESTABLE
    assert verdict.because[0].endswith("of LoRA, 4 it is a lower bound: the plateau reaches an end of the grid")


def test_a_search_cannot_vary_variants(write, study):
    write()
    code, _, error = study("rates.yaml", "--search", "random", "--trials", "2", "--dry-run")
    assert (code, error.count("\n")) == (2, 1)
    assert "study 'rates' has variants, which a search cannot vary" in error
    write(search={"gain": [1, 100, "log"]})
    assert study("rates.yaml", "--search", "random", "--trials", "2", "--dry-run")[0] == 0


def test_recorded_cells_of_the_study_that_came_before_are_cells_of_this_one():
    """`learning_rate`, the rates of LoRA and "residual" on GLUE: its cells are trials of `ablate_rate` there."""
    kept = Path(__file__).parents[2] / "studies/results/cells/learning_rate.jsonl.gz"
    with gzip.open(kept, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    trials = {cell.key for cell in resolve_tuning(read_spec("ablate_rate"), preset="gpu").trials}
    found = {Cell("ablate_rate", line["row"], RunConfig.from_mapping(line["config"])).key for line in lines}
    assert len(found) == len(lines) > 0
    assert found <= trials
