"""What training costs: known tokens, known memory, and what runs aside left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from basisadapt import cost as costs
from basisadapt.cost import Cost

MEGABYTE = 2**20


class Masked(nn.Module):
    def forward(self, attention_mask=None, hold=0):
        return torch.ones(hold * MEGABYTE // 4)


def on_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if not costs.CLEAR.exists():
        pytest.skip("this system does not tell a process' peak memory")


def test_tokens_are_those_of_training_without_padding():
    model, mask = Masked(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    model(attention_mask=mask)
    with Cost(model) as cost:
        model(attention_mask=mask)
        model.eval()(attention_mask=mask)
        model.train()(attention_mask=mask)
    model(attention_mask=mask)
    assert cost.metrics(2.0)["tokens_per_second"] == 4
    with Cost(model) as cost:
        model()
    assert math.isnan(cost.metrics(2.0)["tokens_per_second"]), "no mask, no count"


def test_the_peak_is_what_training_held_at_once_though_it_gave_it_back(monkeypatch):
    on_cpu(monkeypatch)
    kept = torch.ones(64 * MEGABYTE // 4)  # before, so not training's
    with Cost(Masked()) as cost:
        for _ in range(3):
            cost._model(hold=128)
    assert cost.metrics(1.0)["memory.peak_bytes"] / MEGABYTE == pytest.approx(128, abs=16)
    del kept


def test_what_runs_aside_does_not_count(monkeypatch):
    on_cpu(monkeypatch)
    with Cost(Masked()) as cost:
        cost._model(hold=32)
        cost.aside(lambda step, total: Masked()(hold=256))(1, 2)
        cost._model(hold=32)
    assert cost.metrics(1.0)["memory.peak_bytes"] / MEGABYTE == pytest.approx(32, abs=16)


def test_memory_that_cannot_be_told_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("CLEAR", "STATUS"):
        with monkeypatch.context() as patch:
            patch.setattr(costs, name, tmp_path / "absent" / name)
            with Cost(Masked()) as cost:
                cost.aside(lambda step, total: None)(1, 1)
            assert math.isnan(cost.metrics(1.0)["memory.peak_bytes"])


def test_on_a_gpu_the_model_counts():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = Masked()
    kept = torch.ones(64 * MEGABYTE // 4, device="cuda")
    with Cost(model) as cost:
        torch.ones(128 * MEGABYTE // 4, device="cuda")
        cost.aside(lambda step, total: torch.ones(512 * MEGABYTE // 4, device="cuda").sum())(1, 1)
    assert 192 <= cost.metrics(1.0)["memory.peak_bytes"] / MEGABYTE < 256
    del kept
