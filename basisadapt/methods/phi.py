"""φ(BA), ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from basisadapt.methods.method import ADAPTER, PeftMethod
from basisadapt.phi.settings import PhiSettings

if TYPE_CHECKING:
    from peft import PeftConfig


class Phi(PeftMethod, name="phi", settings=PhiSettings):
    """ΔW = s · (p·BA + (φ(g·BA) − c·φ(0)) / g), see `PhiSettings`. Source: Garg, Lucey & Saratchandran."""

    def peft_config(self, settings: PhiSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Our PhiConfig."""
        from basisadapt.adapter import PhiConfig

        return PhiConfig(**{**asdict(settings), **common})

    def before_step(self, model: Any, settings: PhiSettings, step: int, total: int) -> None:
        """Let φ rest while it is to, and add the gradient of its roughness afterwards."""
        bank = model.base_model.phi_bank[ADAPTER]
        if step <= settings.transfer_delay * total:
            for table in bank.parameters():
                table.grad = None
        elif settings.smoothing and (roughness := bank.roughness()).requires_grad:
            tables = [table for table in bank.parameters() if table.grad is not None]
            gradients = torch.autograd.grad(roughness, tables, allow_unused=True, materialize_grads=True)
            for table, gradient in zip(tables, gradients, strict=True):
                table.grad += settings.smoothing * gradient

    def parameters(self, settings: PhiSettings, out_features: int, in_features: int) -> int:
        """r (m + n); φ's tables, which modules may share, are counted apart."""
        return settings.r * (out_features + in_features)
