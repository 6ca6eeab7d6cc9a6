"""Observing: the numbers of known updates, and nothing touched."""

from __future__ import annotations

import math
import operator

import peft
import pytest
import torch

import basisadapt
from basisadapt import PhiConfig
from basisadapt.methods import METHODS
from basisadapt.training.observation import Observer, adapted_layers, observe, summary
from tests.conftest import randomise

PHI = METHODS["phi"]()
CONFIGS = {
    "phi": lambda: PhiConfig(r=3, basis="gaussian_rbf", num_basis=12, omega_init=4.0, task_type="SEQ_CLS"),
    "direct": lambda: PhiConfig(r=3, num_basis=12, backend="direct", task_type="SEQ_CLS"),
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["query", "dense"], task_type="SEQ_CLS"),
}


@pytest.fixture(params=CONFIGS)
def case(request, bert):
    """A model and its method."""
    model = peft.get_peft_model(bert.double(), CONFIGS[request.param]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    randomise(model, scale=0.2)
    return model, METHODS["lora" if request.param == "lora" else "phi"]()


def test_numbers_are_those_of_the_updates(case):
    adapted, method = case
    modules, phi = observe(adapted, method)
    for name, layer in adapted_layers(adapted):
        delta = layer.get_delta_weight("default").detach()
        sigma = torch.linalg.svdvals(delta)
        found = modules[name]
        assert found["stable_rank"] == pytest.approx((sigma.square().sum() / sigma[0] ** 2).item(), rel=1e-6)
        assert found["spectrum"][:3] == pytest.approx((sigma / sigma[0])[:3].tolist(), rel=1e-6)
        assert found["dc_share"] == pytest.approx((delta.mean() ** 2 / delta.square().mean()).item(), abs=1e-9)
        if name in phi:
            settings, BA = layer.phi_settings["default"], layer.phi_B["default"] @ layer.phi_A["default"]
            assert found["range_share"] == pytest.approx(settings.gain * BA.abs().max().item() / settings.interval)
            assert phi[name]["z"][-1] == pytest.approx(BA.abs().max().item())
            assert found["utilisation"] == found["active_n"] / 12
    assert set(phi) in (set(), set(modules))


def test_nothing_is_touched(case, tokens):
    adapted, method = case
    adapted(tokens)
    compilers = {id(layer.phi_source["default"]): layer.phi_source["default"] for _, layer in adapted_layers(adapted)
                 if hasattr(layer, "phi_source")}  # fmt: skip
    before = [(c._choice._count, list(c._kept)) for c in compilers.values()]
    parameters = {name: (p.clone(), p._version) for name, p in adapted.named_parameters()}
    state = torch.get_rng_state()
    first = observe(adapted, method)
    assert observe(adapted, method) == first
    after = [(c._choice._count, c._kept) for c in compilers.values()]
    assert [count for count, _ in after] == [count for count, _ in before]
    for (_, kept), (_, then) in zip(after, before, strict=True):
        assert all(map(operator.is_, kept, then))
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in adapted.named_parameters():
        value, version = parameters[name]
        assert torch.equal(p, value)
        assert p._version == version


def test_planted_amplitudes_are_counted(bert):
    model = peft.get_peft_model(bert.double(), CONFIGS["phi"]())
    randomise(model, scale=0.2)
    bank = model.base_model.phi_bank["default"]
    with torch.no_grad():
        bank.alpha.zero_()
        bank.alpha[:, [2, 5, 9]] = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
        bank.alpha[:, 7] = 0.01
    modules, _ = observe(model, PHI)
    shares = [numbers["range_share"] for numbers in modules.values()]
    assert 1 < min(shares) < max(shares) < 10, "BA reaches the whole grid"
    assert {numbers["active_n"] for numbers in modules.values()} == {3.0}
    metrics = summary(modules, PHI)
    assert metrics["active_n.mean"] == 3
    assert metrics["utilisation.mean"] == 0.25
    assert metrics["alpha.mean_abs"] == pytest.approx(2.31 / 12)
    assert metrics["range.share"] == max(numbers["range_share"] for numbers in modules.values())


def test_omega_over_all_modules(bert):
    model = peft.get_peft_model(bert.double(), CONFIGS["phi"]())
    bank = model.base_model.phi_bank["default"]
    with torch.no_grad():
        bank.raw_omega.copy_(torch.randn(bank.raw_omega.shape, generator=torch.Generator().manual_seed(0)))
    omega = torch.nn.functional.softplus(bank.raw_omega)
    metrics = summary(observe(model, PHI)[0], PHI)
    assert metrics["omega.mean"] == pytest.approx(omega.mean().item())
    assert metrics["omega.std"] == pytest.approx(omega.std(correction=0).item())


def test_how_linear_an_update_is_stands_in_the_run_as_describe_tells_it(case):
    adapted, method = case
    modules, _ = observe(adapted, method)
    metrics = summary(modules, method)
    if not hasattr(adapted.base_model, "phi_bank"):
        assert not {"linear_fit.mean", "nonlinear_share.mean"} & set(metrics)
        return
    frame = basisadapt.describe(adapted)
    for column in ("linear_fit", "nonlinear_share"):
        assert {name: numbers[column] for name, numbers in modules.items()} == pytest.approx(
            dict(frame[column].drop(["mean", "largest"])), rel=1e-12
        )
        assert metrics[f"{column}.mean"] == pytest.approx(frame.loc["mean", column], rel=1e-12)
        assert metrics[f"{column}.largest"] == pytest.approx(frame.loc["largest", column], rel=1e-12)
    on_the_way, _ = observe(adapted, method, snapshot=True)
    assert not any("nonlinear_share" in numbers for numbers in on_the_way.values()), "once, at the end"


def test_modules_with_plain_lora_count_in_no_share(bert):
    config = PhiConfig(r=3, num_basis=12, placement="attention", rest="lora", task_type="SEQ_CLS")
    model = peft.get_peft_model(bert.double(), config)
    randomise(model, scale=0.2)
    modules, phi = observe(model, PHI)
    assert {name for name, numbers in modules.items() if "nonlinear_share" in numbers} == set(phi) < set(modules)


def test_no_update_has_no_rank_and_no_weights_no_phi(bert):
    model = peft.get_peft_model(bert, CONFIGS["phi"]())
    modules, phi = observe(model, PHI)
    assert {numbers["stable_rank"] for numbers in modules.values()} == {0.0}
    assert all(numbers["spectrum"] == [] for numbers in modules.values())
    assert len(phi) == len(modules)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(math.nan)
    modules, phi = observe(model, PHI)
    assert phi == {}
    assert all(math.isfinite(value) for value in summary(modules, PHI).values())


def test_an_observer_takes_snapshots_at_the_start_early_and_midway(bert):
    model = peft.get_peft_model(bert, CONFIGS["phi"]())
    for total, expected in ((1, [0]), (3, [0, 1, 2]), (20, [0, 2, 10])):
        observer = Observer(model, PHI, ())
        for step in range(total + 1):
            observer.step(step, total)
        assert [snapshot["step"] for snapshot in observer.snapshots] == expected
        observer.end()
        assert (observer.modules, observer.phi) == observe(model, PHI)
        assert math.isnan(observer.metrics()["update_smoothness"]), "nothing moved"
        curves = observer.curves(total)
        assert curves["stable_rank.attention"] == [(step, 0.0) for step in [*expected, total]]
        assert curves["update_smoothness"] == []
