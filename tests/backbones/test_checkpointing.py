"""Gradient checkpointing."""

from __future__ import annotations

import pytest
import torch

from basisadapt.methods import METHODS
from basisadapt.training import run
from tests.backbones.common import config


@pytest.mark.parametrize("method", ["lora", "phi"])
def test_checkpointing_changes_no_gradient(language_model, monkeypatch, method):
    """Bit for bit, with dropout, and the activations are indeed computed twice."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    found, passes = [], []

    def keep(_, model, settings, step, total):
        found[-1].append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def forward(mlp, x):
        passes[-1] += mlp.training
        return plain(mlp, x)

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(METHODS[method], "after_step", keep)
    for checkpointing in (False, True):
        found.append([])
        passes.append(0)
        train = {"gradient_checkpointing": checkpointing}
        run(config(language_model, method=method, adapter={"r": 2, "dropout": 0.1}, train=train))
    once, twice = found
    assert len(once) == len(twice) == 2
    assert passes[1] == 2 * passes[0] > 0
    for before, after in zip(once, twice, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(gradient.abs().max() > 0 for gradient in before.values())
