"""How much of a given update φ(BA) captures, by gradient descent from the best BA."""

from __future__ import annotations

import math
from dataclasses import asdict

import peft
import torch
from torch import Tensor, nn

from basisadapt.adapter.config import PhiConfig
from basisadapt.phi.settings import PhiSettings

STEPS, RATE = 100, 0.03  # of Adam, falling linearly to 0; entries of the update are about 1


def fitted_energy(update: Tensor, settings: PhiSettings) -> float:
    """The share of ‖T‖² that F(BA) captures, 1 − ‖F(BA) − T‖² / ‖T‖², for T of shape (m, n).

    A and B start at T's leading singular triplets. With an identity path and φ = 0 at the start, F(BA) is then the best
    approximation of rank r (Eckart & Young, 1936). The best of all steps counts, so the share is at least that of BA,
    and 0 for T = 0. The fit runs in float32 on T's device and leaves the global generators unchanged.
    """
    size = update.double().norm().item()
    if size == 0:
        return 0.0
    target = (update.double() * (math.sqrt(update.numel()) / size)).float()
    model = _adapted(target, settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / STEPS, STEPS)
    unit, best = torch.eye(target.shape[1], device=target.device), 0.0
    for _ in range(STEPS):
        loss = (model(unit).T - target).square().mean()
        best = max(best, 1 - loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return best


def _adapted(target: Tensor, settings: PhiSettings) -> nn.Module:
    """x F(BA)ᵀ, with BA the truncated singular value decomposition of the target."""
    rows, columns = target.shape
    with torch.random.fork_rng():  # A and B are drawn before they are set
        plain = nn.Linear(columns, rows, bias=False, device=target.device)
        nn.init.zeros_(plain.weight)
        model: nn.Module = peft.get_peft_model(
            nn.Sequential(plain), PhiConfig(**{**asdict(settings), "target_modules": ["0"]})
        )
    U, sigma, Vt = torch.linalg.svd(target, full_matrices=False)
    root = sigma[: settings.r].sqrt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".phi_A." in name:
                parameter.copy_(root.unsqueeze(1) * Vt[: settings.r])
            if ".phi_B." in name:
                parameter.copy_(U[:, : settings.r] * root)
    return model
