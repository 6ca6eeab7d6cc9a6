"""AdaLoRA, peft's own, with its allocation at work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from basisadapt.methods.allocation import AllocationSettings
from basisadapt.methods.method import ADAPTER, PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig


class AdaLoRA(PeftMethod, name="adalora", settings=AllocationSettings):
    """ΔW ∝ B diag(E) A, E = 0 at the start; the least important ranks are cut until r a module are left on average.

    Importance: |p g| of every entry of a triplet, smoothed, times its smoothed uncertainty. A penalty on ‖AAᵀ − I‖ and
    ‖BᵀB − I‖ keeps triplets apart; peft adds it to every loss, that of evaluation included. Parameters are counted with
    the room of the start. Source: Zhang et al. (2023).
    """

    def peft_config(self, settings: AllocationSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's AdaLoraConfig; its schedule in steps follows at the first step, when their number is known."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=settings.room,
            target_r=settings.r,
            deltaT=settings.every,
            tinit=0,
            tfinal=0,
            total_step=1,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.dropout,
            orth_reg_weight=settings.orthogonality,
            **common,
        )

    def parameters(self, settings: AllocationSettings, out_features: int, in_features: int) -> int:
        """R (m + n + 1), R = ⌈(1 + spare) r⌉."""
        return settings.room * (out_features + in_features + 1)

    def after_step(self, model: Any, settings: AllocationSettings, step: int, total: int) -> None:
        """Peft's allocation."""
        config = model.peft_config[ADAPTER]
        if config.total_step != total:
            settle = math.floor(settings.settle * total)
            config.total_step, config.tinit, config.tfinal = total, settle, settle
        model.base_model.update_and_allocate(step)
