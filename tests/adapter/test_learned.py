"""What φ has learned: describe against a formula written apart, in float64, and plot."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import basisadapt
from basisadapt import InputError, PhiConfig
from tests.conftest import randomise, tiny

SETTINGS = {"task_type": "SEQ_CLS", "r": 3, "num_basis": 6, "interval": 2.0, "gain": 2.0, "backend": "direct"}


def adapted(family="bert", **settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny(family).double(), PhiConfig(**{**SETTINGS, **settings})).double()
    randomise(model)
    return model.eval()


def update_and_product(model, name, adapter="default"):
    """ΔW = s (p BA + (φ(g BA) − c φ(0)) / g) of the sinc basis, and s BA, from the tensors of a saved adapter alone."""
    layer, config = model.get_base_model().get_submodule(name), model.peft_config[adapter]
    bank = model.base_model.phi_bank[adapter]
    alpha, omega_row, x_row = bank.rows[name]
    alpha, raw, x = bank.alpha[alpha], bank.raw_omega[omega_row], bank.grid[x_row]
    product = layer.phi_B[adapter] @ layer.phi_A[adapter]

    def phi(z):
        u = torch.log1p(raw.exp()) * (z[..., None] - x)
        return (alpha * torch.where(u == 0, 1.0, torch.sin(math.pi * u) / (math.pi * u))).sum(-1)

    g, s = config.gain, config.lora_alpha / config.r
    update = config.identity_path * product + (phi(g * product) - config.centre * phi(torch.zeros(()).double())) / g
    return s * update, s * product


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}, {"lora_alpha": 7.0, "sharing": "kind"}])
def test_the_two_numbers_are_those_of_the_formula(family, settings):
    model = adapted(family, **settings)
    frame = basisadapt.describe(model)
    assert list(frame.columns) == ["linear_fit", "nonlinear_share", "remark"]
    names = [name for name in frame.index if name not in ("mean", "largest")]
    assert names == list(model.base_model.phi_bank["default"].rows)
    for name in names:
        update, product = update_and_product(model, name)
        c = torch.linalg.lstsq(product.reshape(-1, 1), update.reshape(-1, 1)).solution.item()
        share = ((update - c * product).square().sum() / update.square().sum()).sqrt().item()
        assert frame.loc[name, "linear_fit"] == pytest.approx(c, rel=1e-9)
        assert frame.loc[name, "nonlinear_share"] == pytest.approx(share, rel=1e-9)
    for column in ("linear_fit", "nonlinear_share"):
        assert frame.loc["mean", column] == pytest.approx(frame.loc[names, column].mean(), rel=1e-12)
        assert frame.loc["largest", column] == frame.loc[names, column].max()


def test_a_linear_phi_is_told_in_words():
    """The basis "linear" is LoRA with one learned scale a module: ΔW = (1 + α) BA."""
    model = adapted(basis="linear", num_basis=1)
    alpha = model.base_model.phi_bank["default"].alpha
    with torch.no_grad():
        alpha.fill_(0.65 / alpha.shape[1])
    frame = basisadapt.describe(model)
    assert frame["linear_fit"].to_numpy() == pytest.approx(1.65, rel=1e-9)
    assert frame.loc["largest", "nonlinear_share"] < 1e-9
    assert frame.loc["largest", "remark"] == "this φ is LoRA with its scale times 1.65"
    with torch.no_grad():
        alpha[0] = 1.5
    assert basisadapt.describe(model).loc["largest", "remark"] == "this φ is LoRA with its scale times 1.65 to 2.5"


def test_what_is_not_nearly_linear_has_no_remark():
    frame = basisadapt.describe(adapted(preset="paper"))
    assert frame["nonlinear_share"].min() > 0.01
    assert set(frame["remark"]) == {""}


def test_at_the_start_there_is_nothing_to_tell():
    frame = basisadapt.describe(get_peft_model(tiny("bert"), PhiConfig(**SETTINGS)))
    assert frame[["linear_fit", "nonlinear_share"]].isna().to_numpy().all()
    assert set(frame["remark"]) == {""}


def test_merged_switched_off_and_loaded_it_is_the_same(tmp_path):
    model = adapted()
    expected = basisadapt.describe(model)
    model.merge_adapter()
    assert basisadapt.describe(model).equals(expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert basisadapt.describe(model).equals(expected)
    assert basisadapt.describe(model.get_base_model()).equals(expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("bert").double(), tmp_path).double()
    assert basisadapt.describe(loaded).equals(expected)


def test_of_several_adapters_one_is_named():
    model = adapted(task_type=None)
    first = basisadapt.describe(model)
    model.add_adapter("second", PhiConfig(**{**SETTINGS, "task_type": None, "placement": "attention"}))
    model.double()
    randomise(model, 1)
    assert basisadapt.describe(model).index.equals(first.index), "the active one"
    second = basisadapt.describe(model, "second")
    assert len(second) < len(first)
    model.set_adapter("second")
    assert basisadapt.describe(model).equals(second)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="name one adapter of 'default', 'second': 2 are active"):
        basisadapt.describe(model)
    with pytest.raises(InputError, match="unknown adapter 'secnd'; did you mean 'second'"):
        basisadapt.describe(model, "secnd")


@pytest.mark.parametrize("look", [basisadapt.describe, basisadapt.plot])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("bert"),
        lambda: adapted().merge_and_unload(),
        lambda: get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS")),
    ],
    ids=["plain", "merged", "LoRA"],
)
def test_a_model_without_phi_is_refused(look, make):
    with pytest.raises(InputError, match=r"has no φ\(BA\) adapter to look at"):
        look(make())


@pytest.mark.parametrize(("look", "package"), [(basisadapt.describe, "pandas"), (basisadapt.plot, "matplotlib")])
def test_a_missing_package_is_named_with_its_extra(look, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}, .*basisadapt\[lab\]"):
        look(adapted())


def test_the_plot_shows_what_phi_adds(tmp_path):
    model = adapted(lora_alpha=6.0)
    figure = basisadapt.plot(model)
    frame = basisadapt.describe(model)
    assert f"{frame.loc['largest', 'nonlinear_share']:.1%} at most" in figure.get_suptitle()
    lines = [line for axes in figure.axes for line in axes.lines]
    assert len(lines) == len(frame) - 2
    name = frame.index[0]
    panel = next(axes for axes in figure.axes if axes.lines)
    z, y = map(torch.from_numpy, panel.lines[0].get_data())
    update, product = update_and_product(model, name)
    assert z.max().item() == pytest.approx((product / 2).abs().max().item(), rel=1e-12)
    # On the entries of BA, as they are drawn between: what φ adds is (ΔW − s BA) / s.
    order = (product / 2).flatten().argsort()
    drawn = torch.from_numpy(np.interp((product / 2).flatten()[order].detach(), z, y))
    added = ((update - product) / 2).flatten()[order].detach()
    assert (drawn - added).abs().max() < 0.02 * added.abs().max()
    figure.savefig(tmp_path / "phi.png")
    assert (tmp_path / "phi.png").stat().st_size > 10_000
