"""What φ has learned: two numbers per module, and curves."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from basisadapt.adapter.layer import PhiLinear
from basisadapt.core.errors import InputError, require, unknown
from basisadapt.diagnostics.linear import LINEAR, linear_fit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

POINTS = 65  # of a curve


def describe(model: nn.Module, adapter: str | None = None) -> pd.DataFrame:
    """How much of a φ(BA) adapter is LoRA: a row per module with φ, then the rows "mean" and "largest".

    The columns are:

    - "linear_fit": c of the best fit ΔW ≈ c · s · BA, c = ⟨ΔW, s BA⟩ / ⟨s BA, s BA⟩; NaN if BA = 0, as at the start.
    - "nonlinear_share": ‖ΔW − c s BA‖ / ‖ΔW‖ in Frobenius norms, from 0 to 1; NaN if ΔW = 0.
    - "remark": for a share below 1 %, that φ is LoRA with its scale times c.

    "mean" and "largest" leave NaN out. ΔW is what the layers compute, in float32 (float64 for a float64 adapter) and to
    the tolerance of the settings; whether it is merged or switched off changes nothing.

    adapter: its name; None takes the active one. Raises InputError for a model without φ(BA), such as the result of
    `merge_and_unload`, and if pandas is not installed.
    """
    pandas = _needed("pandas")
    rows = {}
    for layer, name in _adapted(model, adapter):
        delta = layer.get_delta_weight(name)
        rows[layer.name] = linear_fit(delta, layer.get_product(name))
    frame: pd.DataFrame = pandas.DataFrame.from_dict(rows, orient="index", columns=["linear_fit", "nonlinear_share"])
    numbers, (fits, shares) = frame.copy(), (frame["linear_fit"], frame["nonlinear_share"])
    frame.loc["mean"], frame.loc["largest"] = numbers.mean(), numbers.max()
    frame["remark"] = [_remark(c, c, share) for c, share in frame[["linear_fit", "nonlinear_share"]].to_numpy()]
    frame.loc["mean", "remark"] = ""
    frame.loc["largest", "remark"] = _remark(fits.min(), fits.max(), shares.max())
    return frame


def plot(model: nn.Module, adapter: str | None = None) -> Figure:
    """What φ adds to BA, f(z) = (φ(g z) − c φ(0)) / g on the range of BA: a panel per projection, a line per layer.

    The title has the mean and the largest nonlinear share of `describe`. adapter: its name; None takes the active one.

    Raises InputError for a model without φ(BA), and if matplotlib or pandas is not installed.
    """
    _needed("matplotlib")
    from basisadapt.diagnostics.figures import phi_figure

    shares = describe(model, adapter)["nonlinear_share"]
    curves = {layer.name: _curve(layer, name) for layer, name in _adapted(model, adapter)}
    title = f"learned φ: nonlinear share {shares['mean']:.1%} on average, {shares['largest']:.1%} at most"
    figure = phi_figure(title, curves)
    assert figure is not None
    return figure


@torch.no_grad()
def _curve(layer: PhiLinear, adapter: str) -> dict[str, list[float]]:
    transfer = layer.phi_source[adapter].transfer(layer.name).double()
    reach = (layer.get_product(adapter).abs().max() / abs(transfer.scaling)).item() if transfer.scaling else 1.0
    z = torch.linspace(-reach, reach, POINTS, dtype=torch.float64, device=transfer.alpha.device)
    added = dataclasses.replace(transfer, path=False, scaling=1.0)(z)
    return {"z": z.tolist(), "phi": added.tolist()}


def _adapted(model: nn.Module, adapter: str | None) -> list[tuple[PhiLinear, str]]:
    """The modules with φ of one adapter, and its name. Raises InputError."""
    require(isinstance(model, nn.Module), "model", model, "what get_peft_model or PeftModel.from_pretrained returned")
    layers = [module for module in model.modules() if isinstance(module, PhiLinear)]
    known = list(dict.fromkeys(name for layer in layers for name in layer.phi_source))
    if not known:
        raise InputError(
            f"this {type(model).__name__} has no φ(BA) adapter to look at (after merge_and_unload it is in the "
            "weights: look before); give the model that get_peft_model or PeftModel.from_pretrained returned"
        )
    if adapter is None:
        active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in known))
        if len(active) != 1:
            raise InputError(f"name one adapter of {', '.join(map(repr, known))}: {len(active)} are active")
        adapter = active[0]
    elif adapter not in known:
        raise unknown("adapter", adapter, known)
    return [(layer, adapter) for layer in layers if adapter in layer.phi_source]


def _remark(low: float, high: float, share: float) -> str:
    """A sentence for a small nonlinear share, otherwise empty; low, high: the least and the greatest c."""
    if not share < LINEAR:
        return ""
    first, last = f"{low:.3g}", f"{high:.3g}"
    return f"this φ is LoRA with its scale times {first if first == last else f'{first} to {last}'}"


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"this needs {package}, which is not installed: pip install 'basisadapt[lab]'") from error
