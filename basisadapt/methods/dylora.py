"""DyLoRA: a LoRA that can be used at every rank up to r."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.adapter.saved import Shape
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod, kaiming
from basisadapt.phi.settings import LowRankSettings


class DyLoRALinear(ProductLinear):
    """ΔW = (lora_alpha / b) B[:, :b] A[:b]; b is uniform on 1..r in each training forward of a module, else b = r.

    All b ranks train; the authors also have a variant that trains only the b-th. Two choices are ours: each module
    draws its own b, and the scale, for which implementations use lora_alpha / b or lora_alpha / √(r b).
    """

    title = "DyLoRA"
    adapter_layer_names = ("dylora_A", "dylora_B")

    def start(self, adapter: str, settings: LowRankSettings) -> Mapping[str, Tensor]:
        """A (r, n) Kaiming-uniform, B (m, r) = 0."""
        r = settings.r
        return {"dylora_A": kaiming(r, self.in_features), "dylora_B": torch.zeros(self.out_features, r)}

    def bottleneck(self, adapter: str, h: Tensor) -> Tensor:
        """h (..., r) times r / b with all but the first b channels zero; b is drawn from torch's CPU generator."""
        if not self.training:
            return h
        r = h.shape[-1]
        b = int(torch.randint(1, r + 1, ()))
        return torch.nn.functional.pad(h[..., :b], (0, r - b)) * (r / b)


@dataclass(kw_only=True)
class DyLoRAConfig(ProductConfig, method="dylora", layer=DyLoRALinear):
    """`LowRankSettings` as a peft configuration."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A (r, n) and B (m, r), all ranks."""
        return {"dylora_A": (self.r, None), "dylora_B": (None, self.r)}


class DyLoRA(ProductMethod, name="dylora", config=DyLoRAConfig):
    """LoRA in which every prefix of the ranks is trained; see `DyLoRALinear`. Source: Valipour et al. (2023)."""
