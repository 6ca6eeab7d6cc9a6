"""PiSSA, peft's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from basisadapt.methods.lora import lora_config
from basisadapt.methods.method import PeftMethod
from basisadapt.phi.settings import LowRankSettings

if TYPE_CHECKING:
    from peft import PeftConfig


class PiSSA(PeftMethod, name="pissa"):
    """LoRA that starts at W's leading singular triplets: s BA = U_r Σ_r V_rᵀ, with W − s BA frozen in W's place.

    Training begins at the pretrained function. Source: Meng, Wang & Zhang (2024).
    """

    def peft_config(self, settings: LowRankSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's LoraConfig with its variant's start."""
        return lora_config(settings, common, init_lora_weights="pissa")

    def parameters(self, settings: LowRankSettings, out_features: int, in_features: int) -> int:
        """r (m + n)."""
        return settings.r * (out_features + in_features)

    def weight_change(self, layer: Any) -> Tensor | None:
        """None: the start, to which the change would be taken, is not kept."""
        return None
