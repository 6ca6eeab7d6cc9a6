"""VeRA, peft's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from basisadapt.methods.method import PeftMethod, RandomBasisSettings

if TYPE_CHECKING:
    from peft import PeftConfig


class VeRA(PeftMethod, name="vera", settings=RandomBasisSettings, bounded=False):
    """ΔW = diag(λ_b) B diag(λ_d) A: A and B frozen, random and shared by all modules, λ_d (r,) = 0.1, λ_b (m,) = 0.

    lora_alpha means nothing. A and B follow from the seed and are not saved. Source: Kopiczko et al. (2024).
    """

    def peft_config(self, settings: RandomBasisSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's VeraConfig."""
        from peft import VeraConfig

        with warnings.catch_warnings():  # that another machine may draw other numbers from the seed
            warnings.simplefilter("ignore", UserWarning)
            return VeraConfig(
                r=settings.r,
                vera_dropout=settings.dropout,
                projection_prng_key=settings.basis_seed or 0,
                save_projection=False,
                **common,
            )
