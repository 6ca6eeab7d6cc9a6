"""AdaLoRA from peft, with its rank allocation run after every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from basisadapt.core.errors import require
from basisadapt.methods.allocation import AllocationSettings
from basisadapt.methods.method import ADAPTER, Method, put_into


@dataclass(kw_only=True)
class AdaLoRASettings(AllocationSettings):
    """The settings of `AllocationSettings` and:

    - `orthogonality` (float ≥ 0, default 0.5): weight of the orthogonality penalty.

    Raises InputError for a value out of range.
    """

    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.orthogonality < math.inf, "orthogonality", self.orthogonality, "at least 0")


class AdaLoRA(Method, name="adalora", settings=AdaLoRASettings, quantisable=False):
    """ΔW ∝ B diag(E) A with E = 0 at the start; the least important ranks are pruned to r per module on average.

    Importance of a triplet: |p g| of each entry p with gradient g, smoothed, times its smoothed uncertainty. A penalty
    on ‖AAᵀ − I‖ and ‖BᵀB − I‖ keeps the triplets orthogonal; peft adds it to every loss, including the evaluation
    loss. Parameters are counted before pruning. Source: Zhang et al. (2023).
    """

    def __init__(self) -> None:
        self._pattern: dict[str, list[bool]] | None = None

    def attach(self, model: PreTrainedModel, settings: AdaLoRASettings, task_type: str | None) -> PeftModel:
        """Attach peft's AdaLoRA. Its schedule is set at the first step, when the number of steps is known."""
        adapted = put_into(model, settings, task_type, _config)
        for name, parameter in adapted.named_parameters():
            if ".ranknum." in name:  # a number of ranks; peft makes it trainable when it moves a layer
                parameter.requires_grad_(False)
        return adapted

    def after_step(self, model: Any, settings: AdaLoRASettings, step: int, total: int) -> None:
        """Run peft's rank allocation for this step, with its schedule spread over `total` steps."""
        config = model.peft_config[ADAPTER]
        if config.total_step != total:
            settle = math.floor(settings.settle * total)
            config.total_step, config.tinit, config.tfinal = total, settle, settle
        # Kept out of the configuration between steps: saved with it, it would cut the tensors in the file, and those of
        # a model that returns to its best checkpoint. Pruned ranks have E = 0 in any case.
        config.rank_pattern = self._pattern
        model.base_model.update_and_allocate(step)
        self._pattern, config.rank_pattern = config.rank_pattern, None


def _config(settings: AdaLoRASettings, common: Mapping[str, Any]) -> PeftConfig:
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
