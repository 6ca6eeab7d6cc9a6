"""Warns if a training ignores those settings of φ that a layer cannot apply: rate, decay, delay and smoothing.

The check takes place at the first optimizer step on φ's tables. One warning names the settings without effect, and what
to do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from basisadapt.phi.bank import TransferBank
from basisadapt.phi.settings import PhiSettings

GROUPS = "give the optimizer basisadapt.param_groups(model, lr, weight_decay)"
STEPS = (
    "call basisadapt.before_step(model, step, total) before every optimizer.step(), or give the Trainer "
    "callbacks=[basisadapt.PhiCallback()]"
)

_unseen: WeakKeyDictionary[TransferBank, PhiSettings] = WeakKeyDictionary()  # banks before their first optimizer step
_served: WeakSet[TransferBank] = WeakSet()  # banks to which `before_step` applies delay and smoothing
_handles: list[RemovableHandle] = []  # of the hook on all optimizers, while there is an unseen bank


def watch(bank: TransferBank, settings: PhiSettings) -> None:
    """Check the first optimizer step on the bank's tables, if any of its settings needs the training's help."""
    by_others = settings.transfer_decay or settings.transfer_delay or settings.smoothing
    if by_others or settings.transfer_lr != 1.0:
        _unseen[bank] = settings
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_look))


def mark_served(bank: TransferBank) -> None:
    """Note that the training applies the bank's delay and smoothing."""
    _served.add(bank)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for bank, settings in list(_unseen.items()):
        tables = {id(table): name for name, table in bank.named_parameters()}
        holding: dict[str, Mapping[str, Any]] = {}  # table -> its group
        others: list[Mapping[str, Any]] = []  # groups of other parameters
        for group in optimizer.param_groups:
            names = [tables.get(id(parameter)) for parameter in group["params"]]
            holding.update({name: group for name in names if name is not None})
            if None in names:
                others.append(group)
        if holding:
            del _unseen[bank]
            if idle := _idle(bank, settings, holding, others):
                what, ways = " and ".join(idle), "; ".join(dict.fromkeys(idle.values()))
                warnings.warn(f"this training ignores {what} of the adapter's settings: {ways}", stacklevel=1)
    if not _unseen:
        while _handles:
            _handles.pop().remove()


def _idle(
    bank: TransferBank, settings: PhiSettings, holding: Mapping[str, Mapping[str, Any]], others: list[Mapping[str, Any]]
) -> dict[str, str]:
    """The settings without effect, and for each what gives it one."""
    idle = {}
    wanted = settings.rate.beside(_rate(others[0]) if others else math.nan)
    known = others or not math.isnan(wanted)  # without another group, the base rate of a ratio is unknown
    if known and not all(math.isclose(_rate(group), wanted, rel_tol=1e-6) for group in holding.values()):
        idle["transfer_lr"] = GROUPS
    decay = holding.get("alpha", {}).get("weight_decay", 0.0)
    if settings.transfer_decay and "alpha" in holding and not math.isclose(decay, settings.transfer_decay):
        idle["transfer_decay"] = GROUPS
    if bank not in _served:
        idle |= {name: STEPS for name in ("transfer_delay", "smoothing") if getattr(settings, name)}
    return idle


def _rate(group: Mapping[str, Any]) -> float:
    """A group's learning rate before any schedule; NaN for an optimizer that has none."""
    rate = group.get("initial_lr", group.get("lr"))
    return math.nan if rate is None else float(rate)
