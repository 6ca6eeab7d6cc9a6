"""What training costs: known tokens, known memory, and what runs aside left out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from basisadapt.training import cost as costs
from basisadapt.training.cost import Cost

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


def held_and_given_back():
    kept = torch.ones(64 * MEGABYTE // 4)  # before, so not training's
    with Cost(Masked()) as cost:
        for _ in range(3):
            cost._model(hold=128)
    del kept
    return cost


def with_something_aside():
    with Cost(Masked()) as cost:
        cost._model(hold=32)
        cost.aside(lambda step, total: Masked()(hold=256))(1, 2)
        cost._model(hold=32)
    return cost


@pytest.mark.parametrize(("measured", "megabytes"), [(held_and_given_back, 128), (with_something_aside, 32)])
def test_the_peak_is_what_training_held_at_once_and_nothing_aside(measured, megabytes, monkeypatch):
    """In a process of its own: what an allocator keeps of earlier tests would count."""
    on_cpu(monkeypatch)
    program = f"from tests.test_cost import *\nprint({measured.__name__}().metrics(1.0)['memory.peak_bytes'])"
    root = Path(__file__).parents[1]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert float(done.stdout) / MEGABYTE == pytest.approx(megabytes, abs=16), done.stderr


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
