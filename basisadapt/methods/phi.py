"""φ(BA), this project's method: a learned function on a low-rank product."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from basisadapt.adapter.config import PhiConfig
from basisadapt.adapter.layer import PhiLinear
from basisadapt.adapter.optimizing import regulate, table_groups
from basisadapt.diagnostics.linear import linear_fit
from basisadapt.diagnostics.transfer import active_count
from basisadapt.methods.method import ADAPTER, Description, ParameterGroup, PeftMethod
from basisadapt.phi.settings import PhiSettings

FINE = 1025  # points on the range of BA at which φ's terms are evaluated
COARSE = 16  # one in this many of them is kept for the curve
LINEARITY = ("linear_fit", "nonlinear_share")  # the numbers of `diagnostics.linear.linear_fit`


class TransferMethod(PeftMethod):
    """A method whose layers are `PhiLinear`; measures φ."""

    def describe(self, layer: PhiLinear) -> Description:
        """A module's numbers of φ, and the curve f(z) = (φ(g z) − c φ(0)) / g on the range of BA.

        - "active_n": the active functions (`diagnostics.transfer`); "utilisation": their share of N.
        - "omega_mean", "omega_std", "alpha_mean", "alpha_std", "alpha_mean_abs": over the N functions.
        - "range_share": max |g·BA| / I.

        Empty for a module of `rest: lora`, which has no φ.
        """
        if ADAPTER not in layer.phi_source:
            return Description()
        A, B, settings = layer.phi_A[ADAPTER], layer.phi_B[ADAPTER], layer.phi_settings[ADAPTER]
        transfer = layer.phi_source[ADAPTER].transfer(layer.name).double()
        alpha, omega = transfer.alpha, transfer.omega
        reach = (B.float() @ A.float()).abs().max().item()
        z = torch.linspace(-reach, reach, FINE, dtype=torch.float64, device=alpha.device)
        # N functions side by side, each with one of φ's amplitudes: the terms of φ.
        terms = dataclasses.replace(transfer, alpha=alpha.diag(), path=False, scaling=1.0)(z)
        active = active_count(terms)
        numbers = {
            "active_n": float(active),
            "utilisation": active / len(alpha),
            "omega_mean": omega.mean().item(),
            "omega_std": omega.std(correction=0).item(),
            "alpha_mean": alpha.mean().item(),
            "alpha_std": alpha.std(correction=0).item(),
            "alpha_mean_abs": alpha.abs().mean().item(),
            "range_share": transfer.gain.item() * reach / settings.interval,
        }
        return Description(numbers, {"z": z[::COARSE].tolist(), "phi": terms[::COARSE].sum(1).tolist()})

    def measure(self, layer: PhiLinear, change: Tensor) -> Mapping[str, float]:
        """How much of ΔW is LoRA's update: the least-squares fit ΔW ≈ c · s · BA (`diagnostics.linear`).

        "linear_fit" is c, and "nonlinear_share" the share of ΔW that the fit leaves unexplained. Empty for a module of
        `rest: lora`, which has no φ.
        """
        if ADAPTER not in layer.phi_source:
            return {}
        return dict(zip(LINEARITY, linear_fit(change, layer.get_product(ADAPTER)), strict=True))

    def summary(self, numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Means over the modules with φ, the standard deviation of all ω of all modules, and the largest range share.

        For each number of `measure`, the mean and the largest value.
        """
        return {**_of_terms([one for one in numbers if "omega_mean" in one]), **_of_linearity(numbers)}


def _of_terms(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not numbers:
        return {}

    def mean(name: str) -> float:
        return statistics.fmean(one[name] for one in numbers)

    within = statistics.fmean(one["omega_std"] ** 2 for one in numbers)
    return {
        "omega.mean": mean("omega_mean"),
        "omega.std": math.sqrt(within + statistics.pvariance(one["omega_mean"] for one in numbers)),
        "alpha.mean_abs": mean("alpha_mean_abs"),
        "active_n.mean": mean("active_n"),
        "utilisation.mean": mean("utilisation"),
        "range.share": max(one["range_share"] for one in numbers),
    }


def _of_linearity(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in LINEARITY:
        values = [one[name] for one in numbers if name in one]
        metrics |= {f"{name}.mean": statistics.fmean(values), f"{name}.largest": max(values)} if values else {}
    return metrics


class Phi(TransferMethod, name="phi", settings=PhiSettings):
    """ΔW = s · (p·BA + (φ(g·BA) − c·φ(0)) / g); see `PhiSettings`. Source: Garg, Lucey & Saratchandran."""

    def peft_config(self, settings: PhiSettings, common: Mapping[str, Any]) -> PeftConfig:
        """The `PhiConfig` with these settings."""
        return PhiConfig(**{**asdict(settings), **common})

    def parameter_groups(self, model: Any, settings: PhiSettings, lr: float) -> Sequence[ParameterGroup]:
        """α with its own decay, and ω, learned grid points and gains without; all at φ's learning rate."""
        groups = table_groups(model.base_model.phi_bank[ADAPTER], settings, lr)
        return [ParameterGroup(tables, rate, decay, transfer=True) for tables, rate, decay in groups]

    def why_constant(self, settings: PhiSettings) -> str:
        """Either the start is a dead point, at which A and B get no gradient, or φ(0) outweighs the rest."""
        if settings.amplitudes.kind == "zero" and not (settings.identity_path or settings.centre):
            return (
                "A dead start: with alpha = 0 and no identity path, phi stays even on a symmetric grid, so phi'(0) = 0 "
                "and, with B = 0, A and B get no gradient; preset=residual has none."
            )
        return "phi(0), the same on every weight, outweighs the rest; centre=true takes it out."

    def before_step(self, model: Any, settings: PhiSettings, step: int, total: int) -> None:
        """Freeze φ for the first `transfer_delay` share of the steps; then add the gradient of the smoothing term."""
        regulate(model.base_model.phi_bank[ADAPTER], settings, step, total)
