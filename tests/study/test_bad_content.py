"""What one cell holds, however odd, is that cell's alone: it is recorded, or fails, and the others are as they were."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from basisadapt.study.record.record import Record
from basisadapt.study.record.texts import NAME_LIMIT, clean
from basisadapt.training import running
from basisadapt.training.config import RunConfig
from basisadapt.training.execution.json_lines import to_line

SEED = ("tiny.yaml", "--seeds", "1")


@pytest.fixture
def of_sinc(fake, monkeypatch):
    """Changes what the runs of the row sinc give."""

    def change(**values):
        def run(config, **options):
            result = fake.run(config, **options)
            if getattr(config.adapter, "basis", "") != "sinc":
                return result
            return dataclasses.replace(result, **{k: v(result) if callable(v) else v for k, v in values.items()})

        monkeypatch.setattr(running, "run", run)

    return change


def test_warnings_of_any_length_are_read_back(home, of_sinc, study, runs):
    of_sinc(warnings=['"\n' * 400] * 20)
    assert study(*SEED)[0] == 0
    assert study("--report", *SEED)[0] == 0
    assert len(json.loads(runs()[1].data.tags["basisadapt.warnings"])) == 4  # of 1,000 characters each, as JSON


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("basisadapt.warnings", '["a warning that was cut'),
        ("basisadapt.warnings", "3"),
        ("basisadapt.owner", "nobody"),
        ("basisadapt.alive", "soon"),
    ],
)
def test_what_cannot_be_read_of_a_run_is_not_the_end(home, fake, study, runs, tag, value):
    study(*SEED)
    record = Record("sqlite:///mlflow.db", "tiny")
    record._client.set_tag(runs()[0].info.run_id, tag, value)
    code, out, _ = study(*SEED)
    assert (code, len(fake.ran)) == (0, 3)
    if "cut" in value:
        assert "a warning that was cut" in out


def test_a_finished_run_without_its_score_has_failed(home, fake, study, runs):
    study(*SEED)
    record = Record("sqlite:///mlflow.db", "tiny")
    record._client.set_tag(runs()[0].info.run_id, "basisadapt.headline", "f1")
    code, out, _ = study("--report", *SEED)
    assert code == 1
    assert "Failed: LoRA seed 1 (its record has no finite 'f1')." in out
    assert study(*SEED)[0] == 0
    assert len(fake.ran) == 4


def names(extra):
    return {"metrics": lambda result: {**result.metrics, **dict.fromkeys(extra, 1.0)}}


MODULE = {"stable_rank": 1.2, "dc_share": 0.1, "kind": "mlp"}


@pytest.mark.parametrize(
    "values",
    [
        names(["точность", "x" * 300, "../x", "a//b", "/", "$", "a\ud800b", "a\0b", "." * 3]),
        {"headline": "точность", "metrics": {"точность": 0.5}},
        {"headline": "x" * 300, "metrics": {"x" * 300: 0.5}},
        {"modules": {"層." * 200 + "0.q": MODULE, "a$b%_$.0.q": MODULE, "a\ud800.0.q": MODULE}, "phi": {}},
        {"warnings": ["a\ud800b", "a\0b", "$_$"], "environment": {"torch": "a\ud800\0", "юникс": "x" * 9000}},
        {"data": {"task": "a\ud800$b%_$.csv"}},
        {"curves": {"loss": [(1, 2.0)], "ошибка": [(1, 1.7e308)], "": [(1, 1.0)]}},
        {"metrics": lambda result: {**result.metrics, "size": 1.7e308, "seconds.train": float("inf")}},
    ],
)
def test_a_result_with_odd_names_and_numbers_is_recorded(home, of_sinc, drawn, study, runs, values):
    of_sinc(**values)
    code, _, err = study(*SEED, "--output", "report")
    assert code == 0, err
    assert [run.data.tags["status"] for run in runs()] == ["finished"] * 3
    assert study("--report", *SEED, "--output", "report")[0] == 0


def test_an_error_with_odd_characters_is_recorded(home, fake, study, runs):
    def score(config):
        raise RuntimeError("a\ud800b \0 $_$" if config.adapter.r == 4 and config.method == "lora" else "x" * 9000)

    fake.score = score
    assert study(*SEED)[0] == 1
    assert [run.data.tags["status"] for run in runs()] == ["failed"] * 3


@pytest.mark.parametrize("score", [1.7e308, float("nan"), -1e200])
def test_a_score_that_cannot_be_compared_fails_its_cell_alone(home, of_sinc, study, runs, score):
    of_sinc(metrics={"accuracy": score})
    code, out, _ = study(*SEED)
    assert code == 1
    assert "Failed: sinc seed 1 (InputError: the run gave no finite 'accuracy'" in out
    assert [run.data.tags["status"] for run in runs()] == ["finished", "failed", "finished"]


def test_texts_that_matplotlib_takes_for_formulas_are_drawn_as_they_are(home, fake, drawn, study):
    from basisadapt.diagnostics.figures import verbatim

    path = home / "tiny.yaml"
    path.write_text(path.read_text().replace("LoRA", "a$b%_$.csv").replace("Two bases", "$_$ and \\$"))
    code, out, err = study(*SEED, "--output", "report")
    assert code == 0, err
    assert "a$b%_$.csv" in out
    assert verbatim("a$b%_$") == r"a\$b%_\$"


def test_names_are_allowed_and_differ():
    from mlflow.utils.validation import _validate_metric_name

    odd = [
        "...",
        "../../x",
        ". ./x",
        "точность",
        "x" * 300,
        "x" * 301,
        "../x",
        "a//b",
        "/",
        "$",
        "%",
        "a\ud800",
        ".",
        "a/.",
        "",
    ]
    for name in odd:
        _validate_metric_name(clean(name))
        assert len(clean(name)) <= NAME_LIMIT
    assert len({clean(name) for name in ["точность", "полнота", "x" * 300, "x" * 301, "$", "%", ""]}) == 7
    assert clean("curve/stable_rank of a-b.c: 3") == "curve/stable_rank of a-b.c: 3"


def results_of(fake, study, options, odd=()):
    """Writes results.jsonl, of all cells; `odd`: number to what is changed in a result."""
    study(*options, "--export", "cells.jsonl")
    lines = []
    for number, text in enumerate(Path("cells.jsonl").read_text().splitlines()):
        cell = json.loads(text)
        result = fake.run(RunConfig.from_mapping(cell["config"]), on_step=lambda *_: None)
        values = {**dataclasses.asdict(result), **dict(odd).get(number, {})}
        lines.append(to_line({**cell, "host": "another", "began": 1.0, "ended": 2.0, "result": values}))
    Path("results.jsonl").write_text("".join(lines))
    fake.ran.clear()


@pytest.mark.parametrize(
    "odd", [{"metrics": {"accuracy": 1.7e308}}, {"snapshots": [{"step": "first"}]}, {"curves": {"loss": [[1, "x"]]}}]
)
def test_an_import_is_refused_before_anything_is_written(home, fake, drawn, study, odd):
    results_of(fake, study, SEED, {1: odd})
    before = sorted(os.listdir())
    code, _, err = study(*SEED, "--import", "results.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert sorted(os.listdir()) == before
    assert Record("sqlite:///mlflow.db", "tiny").experiment_id is None
