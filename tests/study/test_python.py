"""Studies from Python, and recorded cells in pandas."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pandas as pd
import pytest

import basisadapt.study as study
from basisadapt import InputError
from basisadapt.study.report.text import to_csv
from basisadapt.study.report.verdicts import UNTESTABLE

CELLS = sorted((Path(__file__).parents[2] / "studies" / "results" / "cells").glob("*.jsonl.gz"))
CLAIM = 'claims: [{text: "sinc is better", better: sinc, than: fourier}]\nseeds: [1, 2, 3]'


@pytest.fixture
def result(home, fake):
    path = home / "tiny.yaml"
    path.write_text(path.read_text().replace("seeds: [1, 2, 3]", CLAIM))
    return study.run("tiny.yaml", seeds=[1, 2])


def test_a_study_runs_from_python_and_is_read_again(result, fake, home):
    assert sorted(set(fake.ran)) == [(name, seed) for name in ("fourier", "lora", "sinc") for seed in (1, 2)]
    assert result.is_sound
    again = study.read_report("tiny.yaml", seeds=[1, 2], place=study.StudyPaths(output=Path("out")))
    assert (str(again), len(fake.ran)) == (str(result), 6)
    assert (home / "out" / "table.txt").read_text() == str(result)


def test_the_table_as_a_dataframe(result):
    frame = result.to_dataframe()
    assert list(frame["row"]) == ["sinc", "fourier", "LoRA"]
    assert list(frame["basis"])[:2] == ["sinc", "fourier"]
    assert frame["basis"].isna().tolist() == [False, False, True]
    printed = list(csv.DictReader(io.StringIO(to_csv(result.report.table))))
    for name in ("mean", "std", "ci_low", "parameters.trainable"):
        assert [f"{number}" for number in frame[name] if pd.notna(number)] == [
            row[name] for row in printed if row[name]
        ]
    assert frame["difference"][0] == pytest.approx(frame["mean"][0] - frame["mean"][2])


def test_the_cells_as_a_dataframe(result, runs):
    cells = result.cells()
    assert len(cells) == 6
    assert set(cells["state"]) == {"finished"}
    assert set(cells["run_id"]) == {run.info.run_id for run in runs()}
    means = cells.groupby("row")["accuracy"].mean()
    assert means["sinc"] == pytest.approx(result.to_dataframe()["mean"][0])


def test_claims_figure_and_notebook(result):
    (verdict,) = result.claims
    assert (verdict.claim.text, verdict.word) == ("sinc is better", UNTESTABLE)
    assert [label.get_text() for label in result.figure.axes[0].get_yticklabels()] == ["sinc", "fourier", "LoRA"]
    assert result._repr_markdown_().startswith("**Two bases**\n\n| row |")


def test_a_cell_that_failed_is_said(home, fake):
    fake.ways = {("sinc", 1): "raise"}
    result = study.run("tiny.yaml", preset="smoke", changes=["sweep.basis=sinc"])
    assert not result.is_sound
    assert list(result.cells()["state"]) == ["failed", "finished"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ablate_bases"}, "did you mean 'ablate_basis'"),
        ({"name": "tiny.yaml", "preset": "huge"}, "unknown preset 'huge'"),
        ({"name": "tiny.yaml", "changes": ["adapter.r"]}, "--set needs key=value"),
        ({"name": "tiny.yaml", "workers": 0}, "--workers"),
        ({"name": "tiny.yaml", "place": study.StudyPaths(data_dir=Path("nowhere"))}, "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(home, fake, settings, message):
    with pytest.raises(InputError, match=message):
        study.run(**settings)
    assert fake.ran == []


def test_the_package_names_what_it_has():
    assert all(callable(getattr(study, name)) for name in study.__all__)
    assert sorted(study._PUBLIC) == study.__all__
    with pytest.raises(AttributeError, match="no attribute 'search'"):
        study.search  # noqa: B018


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.name.partition(".")[0])
def test_pandas_reads_recorded_cells_in_one_line(path):
    frame = pd.read_json(path, lines=True, nrows=3)
    exact = pd.read_json(path, lines=True, nrows=3, precise_float=True)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))
    assert {"study", "row", "key", "config", "result"} <= set(frame.columns)
    assert frame["result"][0]["metrics"] == pytest.approx(first["result"]["metrics"], rel=1e-12)
    assert exact["result"][0]["metrics"] == first["result"]["metrics"]
