"""What programs read: one JSON document on stdout (`--json`), and nothing else there."""

from __future__ import annotations

import json

import pytest

from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.shipped import list_studies

SPACE = "search: {adapter.gain: [1, 100, log], adapter.basis: [sinc, fourier]}\n"
CLAIM = "claims: [{text: Sinc is better, better: sinc, than: fourier}]\n"


@pytest.fixture
def document(study):
    """Calls the command line with --json: exit code, the document, stderr."""

    def call(*arguments):
        code, printed, error = study(*arguments, "--json")
        return code, json.loads(printed), error

    return call


def by_seed(config):
    """fourier lies below LoRA by 0.01, 0.02, 0.03."""
    less = config.seed / 100 if getattr(config.adapter, "basis", "") == "fourier" else 0.0
    return 0.5 + config.seed / 10 - less


def test_the_list(document):
    code, found, error = document("--list")
    assert (code, error) == (0, "")
    assert [one["study"] for one in found] == list_studies()
    assert found[0]["title"] == read_spec(found[0]["study"]).title


def test_a_run_and_its_report(home, fake, document, runs):
    (home / "tiny.yaml").write_text((home / "tiny.yaml").read_text() + CLAIM)
    (home / "loud.py").write_text("print('hello from a plug-in')\n")
    fake.score = by_seed
    code, found, error = document("tiny.yaml", "--plugin", "loud.py")
    assert code == 0
    assert "hello from a plug-in" in error
    assert "[9/9] fourier, seed 3" in error
    assert list(found) == ["study", "title", "headline", "reference", "rows", "over_tasks", "claims", "tracking_uri"]
    assert (found["study"], found["title"], found["headline"]) == ("tiny", "Two bases", "accuracy")
    assert (found["reference"], found["tracking_uri"]) == ("LoRA", "sqlite:///mlflow.db")

    sinc, fourier, lora = found["rows"]
    assert [row["label"] for row in found["rows"]] == ["sinc", "fourier", "LoRA"]
    assert (fourier["task"], fourier["settings"]) == ("docstrings", {"adapter.basis": "fourier", "method": "phi"})
    assert fourier["values"] == pytest.approx({"1": 0.59, "2": 0.68, "3": 0.77})
    assert (fourier["mean"], fourier["std"]) == pytest.approx((0.68, 0.09))
    # Differences -0.01, -0.02, -0.03: mean -0.02, std 0.01, half of the interval t(0.975, 2) · 0.01 / √3.
    half = 4.302653 * 0.01 / 3**0.5
    assert fourier["difference"]["n"] == 3
    assert fourier["difference"]["mean"] == pytest.approx(-0.02)
    assert fourier["difference"]["low"] == pytest.approx(-0.02 - half)
    assert fourier["difference"]["high"] == pytest.approx(-0.02 + half)
    assert fourier["p_holm"] == pytest.approx(fourier["difference"]["p"]), "one test: sinc equals LoRA on every seed"
    assert (sinc["difference"]["mean"], sinc["difference"]["p"], sinc["p_holm"]) == (0.0, None, None)
    assert (lora["difference"], lora["p_holm"], lora["published"]) == (None, None, None)
    assert sinc["published"] == {"value": "61.1", "std": "0.2"}
    metrics = {"stable_rank.mean": 1.2, "dc_share.mean": 0.1, "parameters.trainable": 1234.0}
    assert sinc["metrics"] == pytest.approx(metrics)
    assert sinc["states"] == {"finished": [1, 2, 3]}
    assert set(sinc["runs"]) == {"1", "2", "3"}
    found_runs = {run.info.run_id: run.data.params["row"] for run in runs()}
    assert {found_runs[run_id] for run_id in sinc["runs"].values()} == {"sinc"}
    assert found["over_tasks"] == []
    (claim,) = found["claims"]
    assert (claim["text"], claim["verdict"]) == ("Sinc is better", "not testable here")
    assert claim["because"][0].startswith("sinc over fourier: +2.00 [-0.48, +4.48], p 0.074")

    assert document("tiny.yaml", "--plugin", "loud.py")[:2] == (0, found), "nothing is run again"
    assert document("--report", "tiny.yaml") == (0, found, "")


def test_what_failed_and_several_tasks(home, fake, document):
    fake.ways = {("fourier", 2): "raise"}
    code, found, _ = document("tiny.yaml", "--set", "sweep.task=glue/cola,glue/rte", "--set", "sweep.basis=fourier")
    assert code == 1
    cola = found["rows"][0]
    assert (cola["label"], cola["task"]) == ("fourier, glue/cola", "glue/cola")
    assert cola["states"] == {"finished": [1, 3], "failed": [2]}
    assert list(cola["values"]) == ["1", "3"]
    fourier, lora = found["over_tasks"]
    assert (fourier["name"], list(fourier["values"])) == ("fourier", ["glue/cola", "glue/rte"])
    assert (fourier["difference"]["n"], lora["difference"]) == (2, None)
    assert fourier["published"] == {"value": "59.2", "std": "0.5"}


def test_a_dry_run(home, fake, document):
    fake.ways = {("sinc", 1): "diverge"}
    document("tiny.yaml", "--seeds", "1", "--set", "sweep.basis=sinc")
    code, found, error = document("tiny.yaml", "--dry-run")
    assert (code, error) == (0, "")
    assert list(found) == ["study", "title", "cells", "downloads", "estimate"]
    assert [cell["key"] for cell in found["cells"]] == [cell.key for cell in resolve(read_spec("tiny.yaml")).cells]
    first = {**found["cells"][0], "key": ""}
    assert first == {
        "key": "",
        "label": "sinc",
        "task": "docstrings",
        "backbone": "minilm",
        "lr": 2e-3,
        "steps": 5,
        "epochs": 3.0,
        "train_rows": None,
        "eval_rows": None,
        "seed": 1,
        "state": "diverged",
        "modules": 36,
        "parameters": {"factors": 4000, "transfer": 100, "head": 10, "trainable": 4110, "total": 10**6},
    }
    assert found["cells"][1]["state"] == "to run"
    assert found["estimate"] is None
    assert found["downloads"] == []
    assert len(fake.ran) == 2, "nothing is run"


def test_a_search(home, fake, document):
    (home / "tiny.yaml").write_text((home / "tiny.yaml").read_text() + SPACE)
    search = ("tiny.yaml", "--search", "random", "--trials", "3", "--seeds", "1")
    code, found, error = document(*search, "--dry-run")
    assert (code, error, found["trials"], found["sampler"]) == (0, "", 3, "random")
    assert found["space"] == {
        "adapter.gain": {"low": 1, "high": 100, "log": True},
        "adapter.basis": ["sinc", "fourier"],
    }
    code, found, error = document(*search)
    assert code == 0
    assert "trial 3 of 3: 0." in error
    values = [trial["value"] for trial in found["trials"]]
    assert values == sorted(values, reverse=True)
    best = found["trials"][0]
    assert (best["status"], found["rows"][0]["label"]) == ("finished", f"trial {best['number']}")
    assert found["rows"][0]["settings"]["adapter.gain"] == best["params"]["adapter.gain"]


def test_an_export(home, fake, document):
    code, found, error = document("tiny.yaml", "--export", "cells.jsonl")
    assert (code, found, error) == (0, {"study": "tiny", "file": "cells.jsonl", "cells": 9}, "")


def test_errors_leave_stdout_empty(folder, study):
    for arguments, message in [
        (("ablate_bassis",), "did you mean 'ablate_basis'"),
        (("--ui",), "--json does not go with --ui"),
    ]:
        code, printed, error = study(*arguments, "--json")
        assert (code, printed) == (2, "")
        assert message in error
        assert error.count("\n") == 1
