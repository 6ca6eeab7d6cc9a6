"""Models that are plain modules, named as peft names them where it tries every tuner, and adapters of them."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from basisadapt import PhiConfig

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 90, dtype=torch.float64).view(9, 10)


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 4, bias=bias)
        self.head = nn.Linear(4, 2, bias=bias)

    def forward(self, x):
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class EmbeddingConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 10)
        self.conv1d = Conv1D(6, 10)
        self.lin0 = nn.Linear(6, 2)

    def forward(self, x):
        return self.lin0(torch.relu(self.conv1d(self.emb((29 * x.abs()).long()))))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(nn.ModuleDict({"lin0": nn.Linear(10, 10)}) for _ in range(3))

    def forward(self, x):
        for layer in self.body.layers:
            x = torch.relu(layer["lin0"](x))
        return x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin0 = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, x):
        return self.lm_head(self.lin0(self.emb((9 * x.abs()).long())))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 10)

    def forward(self, x):
        return self.lin0(self.mha(x, x, x)[0])


class Prefixed(nn.Module):
    """Its modules' names hold the prefix of the method's own."""

    def __init__(self):
        super().__init__()
        self.phi_block = MLP()

    def forward(self, x):
        return self.phi_block(x)


CASES = {
    "MLP": (MLP, {"target_modules": ["lin0"]}),
    "MLP, two layers": (MLP, {"target_modules": ["lin0", "lin1"], "sharing": "all"}),
    "MLP without bias": (lambda: MLP(bias=False), {"target_modules": "lin[01]"}),
    "MLP, rest": (MLP, {"target_modules": ["lin0"], "modules_to_save": ["head"]}),
    "Conv1D": (EmbeddingConv1D, {"target_modules": ["conv1d"]}),
    "Conv1D and Linear": (EmbeddingConv1D, {"target_modules": "all-linear"}),
    "Blocks": (Blocks, {"target_modules": ["lin0"], "layers_to_transform": [0, 2]}),
    "Tied": (Tied, {"target_modules": ["lin0"]}),
    "Prefixed": (Prefixed, {"target_modules": ["lin0"]}),
}
cases = pytest.mark.parametrize("case", CASES)


def config(**settings):
    return PhiConfig(**{"r": 2, "num_basis": 5, "gain": 2.0, "target_modules": ["lin0"], **settings})


def base(model=MLP):
    torch.manual_seed(0)
    return model().double().eval()


@torch.no_grad()
def draw(model, seed=0):
    """Values as training would give them to what is the method's own, whatever the base model's modules are called."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if re.search(r"\.phi_([AB]|bank)\.", name) and not name.endswith(("raw_omega", "grid")):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def adapted(case="MLP", **settings):
    model, own = CASES[case]
    peft_model = get_peft_model(base(model), config(**{**own, **settings}))
    draw(peft_model)
    return peft_model.eval()


def two(first="lin0", second="lin0"):
    """A model with two adapters, the first of them active."""
    model = adapted(target_modules=[first])
    model.add_adapter("other", config(target_modules=[second]))
    draw(model, 1)
    return model.eval()


@torch.no_grad()
def answer(model):
    return model(X)


def trainable(model):
    """What trains, without the names of the modules around it."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name.removeprefix("base_model.").removeprefix("model.") for name in names}


def parts(adapter, *modules):
    """What an adapter trains in the modules."""
    factors = {f"{module}.phi_{factor}.{adapter}" for module in modules for factor in "AB"}
    return factors | {f"phi_bank.{adapter}.{table}" for table in ("alpha", "raw_omega")}


def lora(**settings):
    return LoraConfig(**{"r": 2, "target_modules": ["lin0"], "init_lora_weights": False, **settings})
