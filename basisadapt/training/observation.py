"""Measures every module's update, with the numbers of its method, before, during and after training.

Observing changes nothing: it draws no random numbers and compiles φ separately from the training step. A run gives the
same numbers, bit for bit, with and without it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from basisadapt.adapter.placement import describe
from basisadapt.backbones import is_head
from basisadapt.core.errors import InputError
from basisadapt.core.grouping import grouped
from basisadapt.diagnostics.diagnostic import DIAGNOSTICS, means
from basisadapt.diagnostics.linear import NEGLIGIBLE
from basisadapt.diagnostics.path import UpdatePath
from basisadapt.diagnostics.spectrum import dc_share, normalised, singular_values, stable_rank, stable_rank_of
from basisadapt.methods import Description, Method, ParameterGroup
from basisadapt.training.distributed.shard import gathered

EARLY, MIDDLE = 0.1, 0.5  # of the steps; the paper uses 5 %, 50 % and the end (appendix I.1)
SPECTRUM = 128  # singular values kept of each update
CURVE_POINTS = 100
STANDARD_NUMBERS = ("kind", "stable_rank", "dc_share", "spectrum")

Numbers = dict[str, Any]
Curve = dict[str, list[float]]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The name in the base model and the layer of every adapted module; empty for a model without an adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, without the task's head: A and B, a learned function, or the backbone."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and not is_head(n)}


class Observer:
    """Observes a model while it trains. Call `step` before training, as step 0, and after every step; call `end` last.

    groups: the method's parameter groups of this model. After `end` it has:

    - `snapshots`: [{"step", "stable_rank": {module: number}, "phi": {module: curve}}, ...] at the start, early and
      midway.
    - `modules`, `phi`: the results of `observe` at the end.
    - `seconds` (float): the time that observing took.
    """

    def __init__(self, model: nn.Module, method: Method, groups: Sequence[ParameterGroup]) -> None:
        self._model, self._method = model, method
        apart = {id(parameter) for group in groups if group.transfer for parameter in group.parameters}
        factors = {name: p for name, p in adapter_parameters(model).items() if id(p) not in apart}
        self._start = {name: parameter.detach().clone() for name, parameter in factors.items()}
        self._path = UpdatePath(self._point())
        self._smoothness: list[tuple[int, Tensor]] = []
        self.snapshots: list[dict[str, Any]] = []
        self.modules: dict[str, Numbers] = {}
        self.phi: dict[str, Curve] = {}
        self.seconds = 0.0

    def step(self, step: int, total: int) -> None:
        """Observe the model after `step` of `total` steps."""
        if step > 0:
            self._path.move(self._point())
            if step % max(1, total // CURVE_POINTS) == 0:
                self._smoothness.append((step, self._path.smoothness()))
        if step in {0, math.ceil(EARLY * total), math.ceil(MIDDLE * total)} - {total}:
            modules, phi = self._observe(snapshot=True)
            self.snapshots.append({"step": step, "stable_rank": _stable_ranks(modules), "phi": phi})

    def end(self) -> None:
        """Observe the trained model."""
        self.modules, self.phi = self._observe()

    def _observe(self, snapshot: bool = False) -> tuple[dict[str, Numbers], dict[str, Curve]]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # pending work belongs to the training step
        began = time.perf_counter()
        found = observe(self._model, self._method, snapshot)
        self.seconds += time.perf_counter() - began
        return found

    def curves(self, last: int) -> dict[str, list[tuple[int, float]]]:
        """Curves of the run: the mean stable rank of each kind at the snapshots and at the end, which is step `last`,
        and the smoothness of the path. Only finite values."""
        seen = [*((s["step"], s["stable_rank"]) for s in self.snapshots), (last, _stable_ranks(self.modules))]
        curves: dict[str, list[tuple[int, float]]] = {}
        for kind, members in _kinds(self.modules).items():
            curves[f"stable_rank.{kind}"] = [(at, statistics.fmean(found[m] for m in members)) for at, found in seen]
        curves["update_smoothness"] = [(at, value.item()) for at, value in self._smoothness]
        return {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}

    def metrics(self) -> dict[str, float]:
        """The modules' `summary`, and the smoothness of the adapter's path (`UpdatePath`), NaN if it never moved."""
        return {**summary(self.modules, self._method), "update_smoothness": self._path.smoothness().item()}

    def warnings(self, why_constant: str) -> list[str]:
        """Warnings if most updates are constant matrices, or most factors did not move.

        why_constant: the sentence of `Method.why_constant`.
        """
        modules, moved = self.modules, self._moved()
        if not modules:
            return []
        # B starts at zero, so its distance is compared with the size of A.
        scale = max((before.norm().item() for before in self._start.values()), default=0.0)
        unmoved = sum(distance < 1e-3 * scale for distance in moved.values())
        constant = sum(m["stable_rank"] < 1.05 and m["dc_share"] > 0.9 for m in modules.values())
        warnings = []
        if constant > len(modules) / 2:
            what = "collapsed: most updates are one constant (stable rank 1, DC share above 0.9)."
            warnings.append(f"{what} {why_constant}".rstrip())
        if unmoved > len(modules) / 2:
            warnings.append("collapsed: A and B of most modules did not move.")
        return warnings

    def _moved(self) -> dict[str, float]:
        """For each module the larger of the distances of A and B from their start."""
        moved = dict.fromkeys(self.modules, 0.0)
        for name, before in self._start.items():
            module = next((module for module in moved if f".{module}." in name), None)
            if module is not None:
                distance = (self._model.get_parameter(name) - before).norm().item()
                moved[module] = max(moved[module], distance)
        return moved

    def _point(self) -> Tensor:
        parameters = [parameter.detach().flatten() for parameter in adapter_parameters(self._model).values()]
        return torch.cat([p.to(parameters[0]) for p in parameters]) if parameters else torch.zeros(1)


def summary(modules: dict[str, Numbers], method: Method) -> dict[str, float]:
    """A run's metrics from its modules' numbers; empty without modules.

    Means and standard deviations of stable ranks, the mean DC share, the means of all diagnostics, and the method's
    summary of its own numbers.
    """
    if not modules:
        return {}
    metrics = {"dc_share.mean": statistics.fmean(numbers["dc_share"] for numbers in modules.values())}
    for group, members in {"": list(modules), **{f".{k}": m for k, m in _kinds(modules).items()}}.items():
        ranks = [modules[member]["stable_rank"] for member in members]
        metrics[f"stable_rank{group}.mean"] = statistics.fmean(ranks)
        metrics[f"stable_rank{group}.std"] = statistics.pstdev(ranks)
    of_diagnostics = [{name: numbers[name] for name in DIAGNOSTICS if name in numbers} for numbers in modules.values()]
    shared = {*STANDARD_NUMBERS, *DIAGNOSTICS}
    own = [{name: numbers[name] for name in numbers if name not in shared} for numbers in modules.values()]
    return {**metrics, **method.summary([numbers for numbers in own if numbers]), **means(of_diagnostics)}


def _stable_ranks(modules: dict[str, Numbers]) -> dict[str, float]:
    return {name: numbers["stable_rank"] for name, numbers in modules.items()}


def _kinds(modules: dict[str, Numbers]) -> dict[str, list[str]]:
    return grouped((numbers["kind"], name) for name, numbers in modules.items())


@torch.no_grad()
def observe(model: nn.Module, method: Method, snapshot: bool = False) -> tuple[dict[str, Numbers], dict[str, Curve]]:
    """Every module's numbers and its learned function, as in `training.RunResult`.

    Modules without a ΔW are left out. Entries of ΔW that are not finite count as 0. snapshot: measure of ΔW only the
    stable rank and the diagnostics. All processes of a group must call it.

    Raises InputError if two numbers of a module have the same name.
    """
    modules: dict[str, Numbers] = {}
    curves: dict[str, Curve] = {}
    for name, layer in adapted_layers(model):
        with gathered(layer):
            change = method.weight_change(layer)
            if change is None:
                continue
            delta = torch.nan_to_num(change, posinf=0.0, neginf=0.0)
            if delta.abs().max() < NEGLIGIBLE:
                delta = torch.zeros_like(delta)
            sizes = {"stable_rank": stable_rank_of(delta)} if snapshot else _spectrum(delta)
            numbers = {"kind": describe(name).kind, **sizes}
            description = _finite_description(method.describe(layer))
            _add(description.numbers, numbers)
            of_diagnostics = {name: float(DIAGNOSTICS[name]().number(delta, layer)) for name in DIAGNOSTICS}
            _add(_finite_numbers(of_diagnostics), numbers)
            _add({} if snapshot else _finite_numbers(method.measure(layer, delta)), numbers)
        modules[name] = numbers
        if description.curve:
            curves[name] = description.curve
    return modules, curves


def _finite_description(description: Description) -> Description:
    """The description, or an empty one if any value is not finite."""
    values = itertools.chain(description.numbers.values(), *description.curve.values())
    return description if all(map(math.isfinite, values)) else Description()


def _finite_numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _add(found: Mapping[str, float], numbers: Numbers) -> None:
    """Add `found` to a module's numbers. Raises InputError for a name that is taken."""
    for name in found:
        if name in (*numbers, *STANDARD_NUMBERS):
            raise InputError(f"two numbers of a module are called {name!r}; rename the diagnostic, or the method's own")
    numbers |= found


def _spectrum(delta: Tensor) -> Numbers:
    sigma = singular_values(delta)
    return {"stable_rank": stable_rank(sigma), "dc_share": dc_share(delta), "spectrum": normalised(sigma, SPECTRUM)}
