"""Each of our methods against an independent plain formula, and what each is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from basisadapt.diagnostics.spectrum import singular_values, stable_rank
from basisadapt.methods import METHODS
from basisadapt.observation import adapted_layers
from tests.conftest import tiny


def layer_of(name, **settings):
    """The method's first layer of that name in a tiny model in float64, m = 32 and n = 48, with drawn parameters."""
    torch.manual_seed(0)
    method = METHODS[name]()
    model = method.attach(tiny("bert").double(), METHODS[name].settings(r=4, **settings), "SEQ_CLS").eval()
    layer = next(layer for found, layer in adapted_layers(model) if found.endswith("0.output.dense"))
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model, layer


def test_sinelora(tokens):
    model, layer = layer_of("sinelora", lora_alpha=8.0, frequency=50.0)
    A, B, x = layer.phi_A["default"], layer.phi_B["default"], torch.randn(5, 48, dtype=torch.float64)
    delta = 2 * torch.sin(50 * B @ A) / math.sqrt(48)
    # φ's tables, and so 1 / √n, are float32.
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-7, atol=0)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T, rtol=1e-6, atol=0)
    upstream = torch.randn(5, 32, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), (A, B), upstream)
    torch.testing.assert_close(
        found, torch.autograd.grad(F.linear(x, 2 * torch.sin(50 * B @ A) / math.sqrt(48)), (A, B), upstream)
    )
    assert not [name for name, p in model.named_parameters() if "phi_bank" in name], "the sine has nothing to learn"


def test_sinelora_has_a_higher_stable_rank_than_lora_on_the_same_factors():
    torch.manual_seed(0)
    A, B = torch.randn(4, 48, dtype=torch.float64) / 30, torch.randn(32, 4, dtype=torch.float64) / 2
    ranks = {}
    for name, owner, factors in (("lora", "weight", "lora_"), ("sinelora", None, "phi_")):
        layer = layer_of(name)[1]
        with torch.no_grad():
            for letter, value in (("A", A), ("B", B)):
                factor = getattr(layer, f"{factors}{letter}")["default"]
                (factor if owner is None else getattr(factor, owner)).copy_(value)
        ranks[name] = stable_rank(singular_values(METHODS[name]().weight_change(layer).detach()))
    assert ranks["lora"] < 4
    assert ranks["sinelora"] > 1.5 * ranks["lora"], "sin of a wide argument is of full rank"
    assert ranks["lora"] == pytest.approx(
        (torch.linalg.matrix_norm(B @ A).square() / torch.linalg.matrix_norm(B @ A, 2).square()).item()
    )
