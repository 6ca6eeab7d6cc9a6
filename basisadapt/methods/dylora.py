"""DyLoRA: a LoRA that works at every rank up to r."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.adapter.saved import Shape
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod, kaiming
from basisadapt.phi.settings import LowRankSettings


class DyLoRALinear(ProductLinear):
    """ΔW = (lora_alpha / b) B[:, :b] A[:b], b uniform on 1..r at each training forward of a module, b = r otherwise.

    All b ranks train; the authors also have a variant in which the b-th alone does. Ours: a draw for each module, and
    the scale, for which implementations in use have lora_alpha / b as well as lora_alpha / √(r b).
    """

    title = "DyLoRA"
    adapter_layer_names = ("dylora_A", "dylora_B")

    def start(self, adapter: str, settings: LowRankSettings) -> Mapping[str, Tensor]:
        """A (r, n) Kaiming-uniform, B (m, r) = 0."""
        r = settings.r
        return {"dylora_A": kaiming(r, self.in_features), "dylora_B": torch.zeros(self.out_features, r)}

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B."""
        A, B = self.trained(adapter)
        return A, B

    def between(self, adapter: str, h: Tensor) -> Tensor:
        """Cut to the first b entries, times r / b; b comes from torch's generator of the CPU."""
        if not self.training:
            return h
        r = h.shape[-1]
        b = int(torch.randint(1, r + 1, ()))
        return torch.nn.functional.pad(h[..., :b], (0, r - b)) * (r / b)


@dataclass(kw_only=True)
class DyLoRAConfig(ProductConfig, method="dylora", layer=DyLoRALinear):
    """The settings that all share."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A and B."""
        return {"dylora_A": (self.r, None), "dylora_B": (None, self.r)}


class DyLoRA(ProductMethod, name="dylora", config=DyLoRAConfig):
    """LoRA whose every prefix of ranks is trained, see `DyLoRALinear`. Source: Valipour et al. (2023)."""
