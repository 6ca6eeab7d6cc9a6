"""HiRA, the implementation of peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import HiraConfig, PeftConfig
from torch import Tensor

from basisadapt.methods.method import ADAPTER, PeftMethod
from basisadapt.phi.settings import LowRankSettings


class HiRA(PeftMethod, name="hira", quantisable=False):
    """ΔW = W ∘ (BA), elementwise, A Kaiming-uniform, B = 0; lora_alpha has no effect. Source: Huang et al. (2025)."""

    def peft_config(self, settings: LowRankSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's HiraConfig with r and dropout."""
        return HiraConfig(r=settings.r, hira_dropout=settings.dropout, **common)

    def weight_change(self, layer: Any) -> Tensor | None:
        """ΔW = W ∘ (BA), shape of the weight."""
        return cast(Tensor, layer.get_base_layer().weight * layer.get_delta_weight(ADAPTER))
