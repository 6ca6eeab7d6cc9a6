"""LoRA, the implementation of peft, and the configuration that its variants share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig

from basisadapt.methods.method import PeftMethod
from basisadapt.phi.settings import LowRankSettings


class LoRA(PeftMethod, name="lora"):
    """ΔW = (lora_alpha / r) BA, A (r × n) Kaiming-uniform, B (m × r) = 0. Source: Hu et al. (2022)."""

    def peft_config(self, settings: LowRankSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's LoraConfig with r, lora_alpha and dropout."""
        return lora_config(settings, common)


def lora_config(settings: LowRankSettings, common: Mapping[str, Any], **variant: Any) -> PeftConfig:
    """Peft's LoraConfig with r, lora_alpha and dropout of `settings`; `variant`: further arguments of LoraConfig."""
    return LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.dropout, **common, **variant)
