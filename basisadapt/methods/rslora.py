"""rsLoRA, the implementation of peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from basisadapt.methods.lora import lora_config
from basisadapt.methods.method import PeftMethod
from basisadapt.phi.settings import LowRankSettings


class RankStabilisedLoRA(PeftMethod, name="rslora"):
    """LoRA with ΔW = (lora_alpha / √r) BA, the scale at which large ranks learn stably.

    Source: Kalajdzievski (2023).
    """

    def peft_config(self, settings: LowRankSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's LoraConfig with use_rslora."""
        return lora_config(settings, common, use_rslora=True)
