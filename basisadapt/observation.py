"""What is seen of a run: every module's update and transfer function, at the start, on the way and at the end.

Observing only reads. It draws nothing, and compiles φ apart from the training step, whose choices stay its own: a run
gives the same numbers, bit for bit, with and without.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from basisadapt.backbones import is_head
from basisadapt.diagnostics.path import Path
from basisadapt.diagnostics.spectrum import dc_share, normalised, singular_values, stable_rank, stable_rank_of
from basisadapt.diagnostics.transfer import active_count
from basisadapt.phi.bank import Transfer
from basisadapt.phi.settings import LowRankSettings, PhiSettings

ADAPTER = "default"
EARLY, MIDDLE = 0.1, 0.5  # of the steps; the paper looks at 5 %, 50 % and the end (appendix I.1)
SPECTRUM = 128  # singular values kept of each update
FINE = 1025  # points on the range of BA, where φ's terms are looked at
COARSE = 16  # of which one in so many is kept of the curve
NEGLIGIBLE = 1e-12  # an update that changes no weight of any precision, as a series' rounding where BA = 0
CURVE_POINTS = 100

Numbers = dict[str, Any]
Curve = dict[str, list[float]]
WeightChange = Callable[[Any], Tensor | None]  # ΔW of an adapted layer, or None where a method has no such matrix


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name in the base model and layer of every adapted module; none for a model without an adapter."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, without the task's head: A and B, φ's tables, or the backbone."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and not is_head(n)}


def delta_weight_of(layer: Any) -> Tensor:
    """ΔW as peft's layers give it."""
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    return delta


class Observer:
    """Watches a model while it trains. `step` is called at step 0, before training, and after every step.

    snapshots: [{"step", "stable_rank": {module: number}, "phi": {module: curve}}, ...] at the start, early and midway.
    seconds: what that took. weight_change: see `observe`.
    """

    def __init__(self, model: nn.Module, weight_change: WeightChange = delta_weight_of) -> None:
        self._model, self._weight_change = model, weight_change
        self._start = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
        self._path = Path(self._point())
        self._smoothness: list[tuple[int, Tensor]] = []
        self.snapshots: list[dict[str, Any]] = []
        self.seconds = 0.0

    def step(self, step: int, total: int) -> None:
        """Look at the model after `step` of `total` steps."""
        if step > 0:
            self._path.move(self._point())
            if step % max(1, total // CURVE_POINTS) == 0:
                self._smoothness.append((step, self._path.smoothness()))
        if step in {0, math.ceil(EARLY * total), math.ceil(MIDDLE * total)} - {total}:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what is still at work is the training step's
            began = time.perf_counter()
            modules, phi = observe(self._model, self._weight_change, in_passing=True)
            stable_ranks = {name: numbers["stable_rank"] for name, numbers in modules.items()}
            self.snapshots.append({"step": step, "stable_rank": stable_ranks, "phi": phi})
            self.seconds += time.perf_counter() - began

    def curves(self, modules: dict[str, Numbers], last: int) -> dict[str, list[tuple[int, float]]]:
        """The mean stable rank of each kind at the snapshots and at the end, step `last`; the path's smoothness."""
        seen = [(s["step"], s["stable_rank"]) for s in self.snapshots]
        seen.append((last, {name: numbers["stable_rank"] for name, numbers in modules.items()}))
        curves: dict[str, list[tuple[int, float]]] = {}
        for kind, members in _kinds(modules).items():
            curves[f"stable_rank.{kind}"] = [(at, statistics.fmean(found[m] for m in members)) for at, found in seen]
        curves["update_smoothness"] = [(at, value.item()) for at, value in self._smoothness]
        return {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}

    def smoothness(self) -> float:
        """The smoothness of the adapter's path, see `Path`; NaN if it never moved."""
        return self._path.smoothness().item()

    def warnings(self, modules: dict[str, Numbers], settings: LowRankSettings) -> list[str]:
        """Whether the adapter is a low-rank update in name only, and why."""
        if not modules:
            return []
        moved = self._moved(modules)
        # B starts at zero: what it moved is measured against A.
        scale = max(before.norm().item() for name, before in self._start.items() if ".phi_bank." not in name)
        unmoved = sum(distance < 1e-3 * scale for distance in moved.values())
        constant = sum(m["stable_rank"] < 1.05 and m["dc_share"] > 0.9 for m in modules.values())

        literal = (
            isinstance(settings, PhiSettings)
            and settings.amplitude_init == "zero"
            and not (settings.identity_path or settings.centre)
        )
        cause = (
            "A dead start: with alpha = 0 and no identity path, phi stays even on a symmetric grid, so phi'(0) = 0 "
            "and, with B = 0, A and B get no gradient; preset=residual has none."
            if literal
            else "phi(0), the same on every weight, outweighs the rest; centre=true takes it out."
        )
        warnings = []
        if constant > len(modules) / 2:
            warnings.append(f"collapsed: most updates are one constant (stable rank 1, DC share above 0.9). {cause}")
        if unmoved > len(modules) / 2:
            warnings.append("collapsed: A and B of most modules did not move.")
        return warnings

    def _moved(self, modules: dict[str, Numbers]) -> dict[str, float]:
        """How far each module's A and B have come from their start: the larger of the two distances."""
        moved = dict.fromkeys(modules, 0.0)
        for name, before in self._start.items():
            module = next((module for module in modules if f".{module}." in name), None)
            if module is not None and ".phi_bank." not in name:
                distance = (self._model.get_parameter(name) - before).norm().item()
                moved[module] = max(moved[module], distance)
        return moved

    def _point(self) -> Tensor:
        parameters = [parameter.detach().flatten() for parameter in adapter_parameters(self._model).values()]
        return torch.cat([p.to(parameters[0]) for p in parameters]) if parameters else torch.zeros(1)


def summary(modules: dict[str, Numbers]) -> dict[str, float]:
    """The headline numbers over the modules: means, population standard deviations, and the widest range."""
    if not modules:
        return {}

    def over(name: str, members: list[str]) -> list[float]:
        return [modules[m][name] for m in members if name in modules[m]]

    everything = list(modules)
    metrics = {"dc_share.mean": statistics.fmean(over("dc_share", everything))}
    for group, members in {"": everything, **{f".{k}": m for k, m in _kinds(modules).items()}}.items():
        ranks = over("stable_rank", members)
        metrics[f"stable_rank{group}.mean"] = statistics.fmean(ranks)
        metrics[f"stable_rank{group}.std"] = statistics.pstdev(ranks)
    if omega := over("omega_mean", everything):
        within = statistics.fmean(std**2 for std in over("omega_std", everything))
        metrics["omega.mean"] = statistics.fmean(omega)
        metrics["omega.std"] = math.sqrt(within + statistics.pvariance(omega))  # of all ω of all modules
        metrics["alpha.mean_abs"] = statistics.fmean(over("alpha_mean_abs", everything))
        metrics["active_n.mean"] = statistics.fmean(over("active_n", everything))
        metrics["utilisation.mean"] = statistics.fmean(over("utilisation", everything))
        metrics["range.share"] = max(over("range_share", everything))
    return metrics


def _kinds(modules: dict[str, Numbers]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name, numbers in modules.items():
        kinds.setdefault(numbers["kind"], []).append(name)
    return kinds


@torch.no_grad()
def observe(
    model: nn.Module, weight_change: WeightChange = delta_weight_of, in_passing: bool = False
) -> tuple[dict[str, Numbers], dict[str, Curve]]:
    """Every module's numbers and what φ adds to BA, as `training.RunResult` describes them.

    weight_change: gives ΔW of a layer; modules for which it is None are left out. Of weights that are no longer finite,
    the finite part is described. in_passing: of ΔW no more than its stable rank.
    """
    from basisadapt.adapter.placement import describe

    modules: dict[str, Numbers] = {}
    phi: dict[str, Curve] = {}
    for name, layer, update, transfer in _updates(model, weight_change):
        delta = torch.nan_to_num(update, posinf=0.0, neginf=0.0)
        if delta.abs().max() < NEGLIGIBLE:
            delta = torch.zeros_like(delta)
        modules[name] = {"kind": describe(name).kind, **(_in_passing(delta) if in_passing else _spectrum(delta))}
        if transfer is not None:
            numbers, curve = _transfer(layer, transfer.double())
            if all(map(math.isfinite, [*numbers.values(), *curve["phi"]])):
                modules[name].update(numbers)
                phi[name] = curve
    return modules, phi


def _in_passing(delta: Tensor) -> Numbers:
    return {"stable_rank": stable_rank_of(delta)}


def _spectrum(delta: Tensor) -> Numbers:
    sigma = singular_values(delta)
    return {"stable_rank": stable_rank(sigma), "dc_share": dc_share(delta), "spectrum": normalised(sigma, SPECTRUM)}


def _updates(model: nn.Module, weight_change: WeightChange) -> Iterator[tuple[str, Any, Tensor, Transfer | None]]:
    """Name, layer, ΔW and, where there is one, F of every adapted module; ΔW of a Conv1D may come transposed."""
    from basisadapt.phi.weight import delta_weight

    for name, layer in adapted_layers(model):
        if not _has_phi(layer):
            change = weight_change(layer)
            if change is not None:
                yield name, layer, change, None
            continue
        source = layer.phi_source[ADAPTER]
        fresh = source.fresh(layer.name)
        A, B = layer.phi_A[ADAPTER], layer.phi_B[ADAPTER]
        yield name, layer, delta_weight(A, B, fresh, source.backend(A.device)), source.transfer(layer.name)


def _has_phi(layer: Any) -> bool:
    """False for other methods, and for the modules that `rest: lora` leaves with plain BA."""
    from basisadapt.adapter import PhiLinear

    return isinstance(layer, PhiLinear) and ADAPTER in layer.phi_source


def _transfer(layer: Any, transfer: Transfer) -> tuple[dict[str, float], Curve]:
    """A module's numbers of φ, and the curve f(z) = (φ(g z) − c φ(0)) / g on the range of BA."""
    A, B, settings = layer.phi_A[ADAPTER], layer.phi_B[ADAPTER], layer.phi_settings[ADAPTER]
    alpha, omega = transfer.alpha, transfer.omega
    reach = (B.float() @ A.float()).abs().max().item()
    z = torch.linspace(-reach, reach, FINE, dtype=torch.float64, device=alpha.device)
    # N functions side by side, each with one amplitude of φ's: its terms.
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
    return numbers, {"z": z[::COARSE].tolist(), "phi": terms[::COARSE].sum(1).tolist()}
