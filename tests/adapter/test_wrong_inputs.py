"""What somebody may give to the public functions by mistake is refused in one line."""

from __future__ import annotations

import math

import pytest
from peft import get_peft_model

import basisadapt
from basisadapt import InputError
from basisadapt.phi.basis import BASES
from tests.adapter.toys import MLP, adapted, config

MODEL = r"^model must be what get_peft_model or PeftModel.from_pretrained returned, got "


@pytest.mark.parametrize(
    "call",
    [
        lambda model: basisadapt.param_groups(model, lr=1e-3),
        lambda model: basisadapt.before_step(model, 1, 10),
        basisadapt.describe,
        basisadapt.plot,
    ],
    ids=["param_groups", "before_step", "describe", "plot"],
)
@pytest.mark.parametrize("model", [None, "adapter", 1e-3, config(), iter([])], ids=lambda model: type(model).__name__)
def test_something_else_than_a_model(call, model):
    with pytest.raises(InputError, match=MODEL) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", ["1e-3", -1e-3, math.nan, math.inf, None])
def test_a_rate_that_is_none(name, value):
    with pytest.raises(InputError, match=rf"^{name} must be a number of at least 0, got {value!r}$"):
        basisadapt.param_groups(adapted(), **{"lr": 1e-3, name: value})


@pytest.mark.parametrize("name", ["step", "total"])
@pytest.mark.parametrize("value", ["1", 0, -1, None])
def test_a_step_that_is_none(name, value):
    with pytest.raises(InputError, match=rf"^{name} must be a number of at least 1, got {value!r}$"):
        basisadapt.before_step(adapted(), **{"step": 1, "total": 10, name: value})


def test_a_setting_without_its_name():
    with pytest.raises(TypeError, match=r"^PhiConfig takes settings by name, such as r=8, and got 4 without one$"):
        basisadapt.PhiConfig(4)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda u: u[..., :1], r"must keep the shape of its input, \(1, 33\), got \(1, 1\)"),
        (lambda u: u.float(), r"must keep the dtype of its input, torch.float64, got torch.float32"),
        (lambda u: u.log(), r"must be a number everywhere, and is NaN at -8"),
        (lambda u: u.tolist(), r"^the value of Wrong.forward must be a tensor, got \["),
        (lambda u: u.nothing(), r"cannot be evaluated: AttributeError: 'Tensor' object has no attribute 'nothing'"),
    ],
)
def test_a_basis_that_is_none(forward, message, monkeypatch):
    monkeypatch.setattr(BASES, "_classes", dict(BASES._classes))

    class Wrong(basisadapt.TransferBasis, name="wrong-values"):
        def forward(self, u):
            return forward(u)

    with pytest.raises(InputError, match=message):
        basisadapt.PhiConfig(basis="wrong-values")
    with pytest.raises(InputError, match=message):
        basisadapt.RunConfig.from_mapping({"adapter": {"basis": "wrong-values"}})


def test_a_run_of_plain_values():
    with pytest.raises(InputError, match=r"^config must be a RunConfig, such as RunConfig.from_mapping makes of"):
        basisadapt.run({"method": "lora"})


def test_a_target_that_no_module_has():
    message = "unknown module in target_modules 'lin00'; did you mean 'lin0'"
    with pytest.warns(UserWarning, match=rf"^{message}.*; it is left out$"):
        model = get_peft_model(MLP(), basisadapt.PhiConfig(r=2, target_modules=["lin00", "lin1"]))
    assert [layer.name for layer in model.base_model._layers()] == ["lin1"]
    with pytest.raises(InputError, match=f"^{message}"):
        get_peft_model(MLP(), basisadapt.PhiConfig(r=2, target_modules=["lin00", "q"]))
