"""Runs that do not start, or whose loss or gradient is not finite."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
from transformers import TrainerState

from basisadapt.diagnostics.figures import figures
from basisadapt.methods import METHODS
from basisadapt.training import run
from basisadapt.training.observation import Observer
from basisadapt.training.trainer import make_watch
from tests.short_runs import config


def test_the_literal_recipe_does_not_start(monkeypatch):
    """B = 0, alpha = 0, the paper's rate: in exact arithmetic A and B never move; here, not beyond rounding."""
    moved = []

    def measure(observer, why_constant):
        starts = observer._start.items()
        moved.extend((observer._model.get_parameter(name) - start).abs().max().item() for name, start in starts)
        return original(observer, why_constant)

    original = Observer.warnings
    monkeypatch.setattr(Observer, "warnings", measure)
    result = run(config(train={"max_steps": 20, "lr": 1e-4}, adapter={"preset": "paper", "r": 4}))
    assert len(moved) == 72
    assert max(moved) < 20 * 1e-4 / 50, "a healthy run moves by about lr a step"
    assert statistics.median(moved) < 1e-9
    assert {round(m["stable_rank"], 6) for m in result.modules.values()} == {1.0}
    assert min(m["dc_share"] for m in result.modules.values()) > 0.99
    constant, unmoved = result.warnings
    assert "most updates are one constant" in constant
    assert "dead start" in constant
    assert "A and B of most modules did not move" in unmoved


def test_residual_does_start(small):
    result = run(small(train={"max_steps": 20}, adapter={"r": 4}))
    assert result.warnings == []
    assert result.metrics["stable_rank.mean"] > 1.01


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    class Control:
        should_training_stop = False

    watch, control, state = make_watch(*[lambda *_: None] * 4), Control(), TrainerState(global_step=7, max_steps=9)
    watch.on_train_begin(None, state, control)
    watch.on_log(None, state, control, logs={"loss": 1.0})
    assert not watch.reason
    watch.on_log(None, state, control, logs={"loss": loss})
    assert watch.reason == "diverged: the loss was not finite at step 7, and the run ended"
    assert control.should_training_stop


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_by_its_step(bad, monkeypatch, small):
    def poison(self, model, settings, step, total):
        if step == 3:  # the fourth gradient shows it
            next(p for p in model.parameters() if p.requires_grad).data.flatten()[0] = bad

    monkeypatch.setattr(METHODS["lora"], "after_step", poison)
    steps = []
    result = run(small(method="lora", train={"max_steps": 400}), on_step=lambda step, _: steps.append(step))
    assert result.status == "diverged"
    assert "diverged: the gradient was not finite at step 4, and the run ended" in result.warnings
    assert steps == [1, 2, 3, 4]


def test_divergence_is_a_result(small):
    result = run(small(train={"lr": 1e30, "max_steps": 30, "landscape": 3}, adapter={"r": 4}))
    assert result.status == "diverged"
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert "accuracy" not in result.metrics
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert figures("diverged", dataclasses.asdict(result))
    assert len(result.curves["loss"]) < 30


def test_the_last_update_too_may_break_a_run(small):
    """No training loss follows it."""
    result = run(small(train={"lr": 1e30, "max_steps": 2}, adapter={"r": 4}))
    assert len(result.curves["loss"]) == 2, "all of them finite"
    assert result.status == "diverged"
    assert {"accuracy", "eval_loss", "generalisation_gap"}.isdisjoint(result.metrics)
