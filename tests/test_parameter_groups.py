"""Rates of their own: phi's, and those of a rival."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from basisadapt import InputError
from basisadapt.backbones import find, shape_only
from basisadapt.core.settings import seed
from basisadapt.diagnostics.figures import figures
from basisadapt.methods import METHODS, Description, ParameterGroup, PeftMethod
from basisadapt.methods.lora import lora_config
from basisadapt.phi.settings import LowRankSettings
from basisadapt.training import attach, count_parameters, run
from basisadapt.training.trainer import make_optimizer
from tests.short_runs import config


def adapted(chosen):
    """A model of MiniLM's shapes with the method in it, and the method's groups."""
    method = METHODS[chosen.method]()
    model = attach(shape_only(find("minilm"), "text", 2), method, chosen, "text")
    return model, method.parameter_groups(model, chosen.adapter, chosen.train.lr)


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ({}, 2e-3),
        ({"transfer_lr": 0.1}, 2e-4),
        ({"transfer_lr": "absolute:0.05"}, 0.05),
        ({"preset": "nyquist"}, 0.03),
        ({"preset": "nyquist", "transfer_lr": 2.0}, 4e-3),
    ],
)
def test_the_rate_of_phi_follows_the_base_rate_or_is_its_own(adapter, rate):
    chosen = config(adapter={"r": 2, **adapter}, train={"lr": 2e-3})
    model, groups = adapted(chosen)
    base, amplitudes, others = make_optimizer(model, groups, chosen.train).param_groups
    assert (base["lr"], amplitudes["lr"], others["lr"]) == (2e-3, pytest.approx(rate), pytest.approx(rate))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in amplitudes["params"]} == {"alpha"}


@pytest.mark.parametrize("rate", ["absolute", "absolute:fast", "ratio:2", "absolute:-1", "absolute:nan", "", -0.5])
def test_what_is_no_rate_of_phi(rate):
    with pytest.raises(InputError, match=r"transfer_lr must be at least 0, or \"absolute:RATE\" with such a rate, got"):
        config(adapter={"transfer_lr": rate})


@pytest.fixture
def loraplus():
    """A rival with a rate of its own for B, and a number of its own of every module."""

    class LoRAPlus(PeftMethod, name="loraplus_of_test", settings=LoRAPlusSettings):
        made = 0

        def __init__(self):
            LoRAPlus.made += 1
            self.steps = 0

        def peft_config(self, settings, common):
            return lora_config(settings, common)

        def parameter_groups(self, model, settings, lr):
            assert settings.draw_seed is not None
            return [
                ParameterGroup([p for name, p in model.named_parameters() if "lora_B" in name], settings.ratio * lr)
            ]

        def describe(self, layer):
            return Description({"size_of_b": layer.lora_B["default"].weight.abs().max().item()})

        def after_step(self, model, settings, step, total):
            self.steps += 1
            assert self.steps == step, "one object serves the run"

    yield LoRAPlus
    del METHODS._classes["loraplus_of_test"]


@dataclasses.dataclass(kw_only=True)
class LoRAPlusSettings(LowRankSettings):
    ratio: float = 1.0
    draw_seed: int | None = seed()


def test_a_rival_has_its_own_rate_and_its_own_number(loraplus, small):
    slow, fast = (run(small(method="loraplus_of_test", adapter={"r": 2, "ratio": ratio})) for ratio in (1.0, 16.0))
    assert loraplus.made == 2, "one for each run"
    lora = run(small(method="lora", adapter={"r": 2}))
    assert slow.curves["loss"] == lora.curves["loss"]
    sizes = [numbers["size_of_b"] for numbers in fast.modules.values()]
    assert fast.metrics["size_of_b.mean"] == pytest.approx(statistics.fmean(sizes))
    assert fast.metrics["size_of_b.mean"] > 8 * slow.metrics["size_of_b.mean"] > 0
    assert (fast.metrics["parameters.transfer"], lora.metrics["parameters.transfer"]) == (0, 0)
    assert "size_of_b.mean" not in lora.metrics
    assert "modules.png" in figures("fast", dataclasses.asdict(fast))


def test_one_learned_number_is_a_learned_scale():
    adapter = {"r": 2, "basis": "linear", "num_basis": 1, "omega_init": 1.0, "learn_omega": False}
    counts = count_parameters(*adapted(config(adapter=adapter)))
    assert counts.transfer == counts.modules
