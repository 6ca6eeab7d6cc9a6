"""DoRA, the implementation of peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from basisadapt.methods.lora import lora_config
from basisadapt.methods.method import ADAPTER, PeftMethod
from basisadapt.phi.settings import LowRankSettings

ROUNDING = 1e-6  # of a norm in float32


class DoRA(PeftMethod, name="dora", quantisable=False):
    """W + ΔW = diag(μ / ‖V‖) V with V = W + s BA and ‖V‖ the norms of its rows; μ (m,) starts at the row norms of W.

    A, B and s as in LoRA. Source: Liu et al. (2024).
    """

    def peft_config(self, settings: LowRankSettings, common: Mapping[str, Any]) -> PeftConfig:
        """Peft's LoraConfig with use_dora."""
        return lora_config(settings, common, use_dora=True)

    def weight_change(self, layer: Any) -> Tensor | None:
        """ΔW = diag(μ / ‖V‖) V − W, shape of the weight; norms that differ only by rounding count as equal."""
        W, transposed = layer.get_base_layer().weight, layer.fan_in_fan_out
        W, delta = (M.T if transposed else M for M in (W, layer.get_delta_weight(ADAPTER)))
        V = W + delta
        scale = (layer.lora_magnitude_vector[ADAPTER].weight / V.norm(dim=1)).unsqueeze(1)
        scale = torch.where((scale - 1).abs() < ROUNDING, 1.0, scale)
        change: Tensor = scale * delta + (scale - 1) * W
        return change.T if transposed else change
