"""PiSSA, the implementation of peft."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from basisadapt.methods.lora import lora_config
from basisadapt.methods.method import ADAPTER, Method, put_into
from basisadapt.phi.settings import LowRankSettings


class PiSSA(Method, name="pissa", quantisable=False):
    """LoRA that starts at W's leading singular triplets: s BA = U_r Σ_r V_rᵀ, and W − s BA is frozen instead of W.

    Training begins at the pretrained function, so ΔW = s (BA − B₀A₀), with B₀ and A₀ the factors at the start.
    Source: Meng, Wang & Zhang (2024).
    """

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PeftModel:
        """Attach peft's LoRA with the PiSSA start; a model on the meta device has no weights to start from."""
        start = True if next(model.parameters()).is_meta else "pissa"
        adapted = put_into(model, settings, task_type, functools.partial(lora_config, init_lora_weights=start))
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):  # not part of the layer's state: a saved adapter needs no start
                layer.pissa_start = [factor.detach().clone() for factor in _factors(layer)]
        return adapted

    def weight_change(self, layer: Any) -> Tensor | None:
        """ΔW = s (BA − B₀A₀), shape of the weight; None for a loaded adapter, whose start is not known."""
        start = getattr(layer, "pissa_start", None)
        if start is None:
            return None
        A, B = _factors(layer)
        A0, B0 = (factor.to(A) for factor in start)
        change: Tensor = layer.scaling[ADAPTER] * (B @ A - B0 @ A0)
        return change.T if layer.fan_in_fan_out else change


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
