"""The settings of φ that training applies: parameter groups with their own rates and decay, a delay, and smoothing.

The same functions serve this package's training, a loop of your own, and transformers' Trainer with its subclasses
(`PhiCallback`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from basisadapt.adapter.honored import mark_served
from basisadapt.adapter.layer import PhiLinear
from basisadapt.adapter.model import PhiModel
from basisadapt.core.errors import InputError, require
from basisadapt.phi.bank import TransferBank
from basisadapt.phi.settings import PhiSettings


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """All trained parameters of the model, as the parameter groups of a torch optimizer.

    The first group has A, B, the head and all else that trains, with `lr` and `weight_decay`. Each adapter adds a group
    of α, with the rate of `transfer_lr` (a ratio to `lr`, or the rate itself) and `transfer_decay`, and one of ω and
    learned x and g, with that rate and no decay. Empty groups are left out. A model without φ has only the first group.

    - `lr` (float ≥ 0): the base learning rate.
    - `weight_decay` (float ≥ 0, default 0): as the optimizer defines it.

    Raises InputError for the model inside a peft model, which lacks φ's tables, and for a value out of range.

    Example: torch.optim.AdamW(basisadapt.param_groups(model, lr=1e-4, weight_decay=0.01)).
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        require(isinstance(value, Real) and 0 <= value < math.inf, name, value, "a number of at least 0")
    banks = _banks(model)
    tables = {id(table) for bank, _ in banks for table in bank.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, "weight_decay": weight_decay}]
    for bank, settings in banks:
        for trained, rate, decay in table_groups(bank, settings, lr):
            groups.append({"params": trained, "lr": rate, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def table_groups(
    bank: TransferBank, settings: PhiSettings, lr: float
) -> Iterator[tuple[list[nn.Parameter], float, float]]:
    """Tables, rate and decay of one adapter's two groups, for the base rate `lr`: α, and all other trained tables."""
    trained = {name: table for name, table in bank.named_parameters() if table.requires_grad}
    alpha, rate = trained.pop("alpha", None), settings.rate.beside(lr)
    yield [] if alpha is None else [alpha], rate, settings.transfer_decay
    yield list(trained.values()), rate, 0.0


def before_step(model: nn.Module, step: int, total: int) -> None:
    """Freeze φ for the first `transfer_delay` share of the steps, and add the gradient of its `smoothing` afterwards.

    Call it before every `optimizer.step()`, when the gradients are unscaled and clipped. The loss is then
    L + λ · mean φ''², λ = smoothing. A model without φ does not change.

    - `step` (int ≥ 1): the number of the coming step.
    - `total` (int): of all steps.

    Raises InputError for the model inside a peft model, and for a value out of range.
    """
    for name, value in (("step", step), ("total", total)):
        require(isinstance(value, Real) and value >= 1, name, value, "a number of at least 1")
    for bank, settings in _banks(model):
        regulate(bank, settings, step, total)


def regulate(bank: TransferBank, settings: PhiSettings, step: int, total: int) -> None:
    """`before_step` for one adapter."""
    mark_served(bank)
    if step <= settings.transfer_delay * total:
        for table in bank.parameters():
            table.grad = None
    elif settings.smoothing and (roughness := bank.roughness()).requires_grad:
        tables: list[Any] = [table for table in bank.parameters() if table.grad is not None]
        gradients = torch.autograd.grad(roughness, tables, allow_unused=True, materialize_grads=True)
        for table, gradient in zip(tables, gradients, strict=True):
            table.grad += settings.smoothing * gradient


class PhiCallback(TrainerCallback):  # type: ignore[misc]
    """`before_step` at every step of transformers' Trainer or a subclass, such as TRL's trainers.

    Rates and decay belong to the optimizer: Trainer(..., optimizers=(AdamW(param_groups(model, lr)), None),
    callbacks=[PhiCallback()]). With None, the Trainer makes its schedule.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The Trainer calls it when the gradients are clipped."""
        before_step(model, state.global_step + 1, state.max_steps)


def _banks(model: nn.Module) -> list[tuple[TransferBank, PhiSettings]]:
    """The tables of every φ(BA) adapter in the model, and its settings. Raises InputError as `param_groups`."""
    require(isinstance(model, nn.Module), "model", model, "what get_peft_model or PeftModel.from_pretrained returned")
    models = [module for module in model.modules() if isinstance(module, PhiModel)]
    if not models and any(isinstance(module, PhiLinear) for module in model.modules()):
        raise InputError("φ's tables are in the peft model, not in the model inside of it: give the peft model itself")
    found: list[Any] = [(bank, part.peft_config[name]) for part in models for name, bank in part.phi_bank.items()]
    return found
