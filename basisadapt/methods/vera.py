"""VeRA, peft's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from basisadapt.methods.method import PeftMethod, RandomBasisSettings

if TYPE_CHECKING:
    from peft import PeftConfig


class VeRA(PeftMethod, name="vera", settings=RandomBasisSettings, bounded=False):
    """ΔW = diag(λ_b) B diag(λ_d) A: A and B frozen, random and shared by all modules, λ_d (r,) = 0.1, λ_b (m,) = 0.

    It has no scale; lora_alpha means nothing. The file holds A and B. Source: Kopiczko et al. (2024).
    """

    def peft_config(self, settings: RandomBasisSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's VeraConfig."""
        from peft import VeraConfig

        return VeraConfig(
            r=settings.r, vera_dropout=settings.dropout, projection_prng_key=settings.basis_seed or 0, **common
        )

    def parameters(self, settings: RandomBasisSettings, out_features: int, in_features: int) -> int:
        """r + m."""
        return settings.r + out_features
