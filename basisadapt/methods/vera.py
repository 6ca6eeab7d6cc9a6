"""VeRA, the implementation of peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, VeraConfig

from basisadapt.methods.method import PeftMethod, RandomBasisSettings, random_basis_config


class VeRA(PeftMethod, name="vera", settings=RandomBasisSettings, bounded=False):
    """ΔW = diag(λ_b) B diag(λ_d) A, with A and B frozen, random and shared by all modules; λ_d (r,) and λ_b (m,) train.

    They start at λ_d = 0.1 and λ_b = 0. lora_alpha has no effect. A and B follow from the seed and are not saved.
    Source: Kopiczko et al. (2024).
    """

    def peft_config(self, settings: RandomBasisSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's VeraConfig, whose matrices follow from basis_seed."""
        return random_basis_config(VeraConfig, settings, vera_dropout=settings.dropout, **common)
