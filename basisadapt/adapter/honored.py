"""Whether whoever trains a model honors the settings of its φ that no layer can: its rate, decay, rest and smoothing.

It is seen at the first step that an optimiser makes on φ's tables; where a setting does nothing there, one warning says
so, and what to do.
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

GROUPS = "give the optimiser basisadapt.param_groups(model, lr, weight_decay)"
STEPS = (
    "call basisadapt.before_step(model, step, total) before every optimizer.step(), or give the Trainer "
    "callbacks=[basisadapt.PhiCallback()]"
)

_unseen: WeakKeyDictionary[TransferBank, PhiSettings] = WeakKeyDictionary()  # those that no optimiser has moved yet
_served: WeakSet[TransferBank] = WeakSet()  # those whose rest and smoothing somebody sees to
_handles: list[RemovableHandle] = []  # of the look at every optimiser's steps, while there is something unseen


def watch(bank: TransferBank, settings: PhiSettings) -> None:
    """Have the first step that any optimiser makes on the bank's tables looked at, if the settings ask for it."""
    by_others = settings.transfer_decay or settings.transfer_delay or settings.smoothing
    if by_others or settings.transfer_lr != 1.0:
        _unseen[bank] = settings
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_look))


def mark_served(bank: TransferBank) -> None:
    """Note that somebody sees to the bank's rest and smoothing."""
    _served.add(bank)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for bank, settings in list(_unseen.items()):
        tables = {id(table): name for name, table in bank.named_parameters()}
        holding: dict[str, Mapping[str, Any]] = {}  # table -> its group
        others: list[Mapping[str, Any]] = []  # groups of what else trains
        for group in optimizer.param_groups:
            names = [tables.get(id(parameter)) for parameter in group["params"]]
            holding.update({name: group for name in names if name is not None})
            if None in names:
                others.append(group)
        if holding:
            del _unseen[bank]
            _warn(_idle(bank, settings, holding, others))
    if not _unseen:
        while _handles:
            _handles.pop().remove()


def _idle(
    bank: TransferBank,
    settings: PhiSettings,
    holding: Mapping[str, Mapping[str, Any]],
    others: list[Mapping[str, Any]],
) -> dict[str, str]:
    """The settings that do nothing, and what would have them do something."""
    idle = {}
    wanted = settings.rate.beside(_rate(others[0]) if others else math.nan)
    known = others or not math.isnan(wanted)  # a ratio to a rate that nothing else has cannot be told from another
    if known and not all(math.isclose(_rate(group), wanted, rel_tol=1e-6) for group in holding.values()):
        idle["transfer_lr"] = GROUPS
    decay = holding.get("alpha", {}).get("weight_decay", 0.0)
    if settings.transfer_decay and "alpha" in holding and not math.isclose(decay, settings.transfer_decay):
        idle["transfer_decay"] = GROUPS
    if bank not in _served:
        idle |= {name: STEPS for name in ("transfer_delay", "smoothing") if getattr(settings, name)}
    return idle


def _rate(group: Mapping[str, Any]) -> float:
    """A group's learning rate before any schedule; NaN where its optimiser finds one by itself."""
    rate = group.get("initial_lr", group.get("lr"))
    return math.nan if rate is None else float(rate)


def _warn(idle: Mapping[str, str]) -> None:
    if idle:
        what = " and ".join(idle)
        ways = "; ".join(dict.fromkeys(idle.values()))
        warnings.warn(f"this training ignores {what} of the adapter's settings: {ways}", stacklevel=2)
