"""PiSSA, peft's own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from basisadapt.methods.lora import lora_config
from basisadapt.methods.method import Method, put_into
from basisadapt.phi.settings import LowRankSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PiSSA(Method, name="pissa", quantisable=False):
    """LoRA that starts at W's leading singular triplets: s BA = U_r Σ_r V_rᵀ, with W − s BA frozen in W's place.

    Training begins at the pretrained function. Source: Meng, Wang & Zhang (2024).
    """

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PeftModel:
        """Peft's LoRA with its variant's start; there is none to be computed for a model of shapes alone."""
        start = True if next(model.parameters()).is_meta else "pissa"
        return put_into(model, settings, task_type, functools.partial(lora_config, init_lora_weights=start))

    def parameters(self, settings: LowRankSettings, out_features: int, in_features: int) -> int:
        """r (m + n)."""
        return settings.r * (out_features + in_features)

    def weight_change(self, layer: Any) -> Tensor | None:
        """None: the start, to which the change would be taken, is not kept."""
        return None
