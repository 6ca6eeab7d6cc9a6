"""RandLoRA, the implementation of peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, RandLoraConfig

from basisadapt.methods.method import PeftMethod, RandomBasisSettings, random_basis_config


class RandLoRA(PeftMethod, name="randlora", settings=RandomBasisSettings, quantisable=False):
    """ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j), j = 1..K, with A and B_j frozen, random and of rank r.

    K = ⌈min(m, n) / r⌉ terms suffice for full rank. λ_j (r,) = 0 and γ_j (min(m, n),) train; for m < n the formula is
    transposed. A larger r means fewer parameters. The bases follow from the seed and are not saved. peft's default is
    lora_alpha = 20 r. Source: Albert et al. (2025).
    """

    def peft_config(self, settings: RandomBasisSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's RandLoraConfig, whose bases follow from basis_seed."""
        own = {"randlora_alpha": settings.lora_alpha, "randlora_dropout": settings.dropout}
        return random_basis_config(RandLoraConfig, settings, **own, **common)
