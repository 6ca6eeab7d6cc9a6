"""KRAdapter: the Khatri-Rao product of two factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from basisadapt.adapter.saved import Shape
from basisadapt.methods.product import AddedLinear, ProductConfig, ProductMethod, kaiming
from basisadapt.phi.choice import compute_dtype
from basisadapt.phi.settings import LowRankSettings


class KRAdapterLinear(AddedLinear):
    """ΔW = s K for m ≤ n, else s Kᵀ; the rows of K (min, max) are vec(uᵢ vᵢᵀ), cut to max = max(m, n) entries.

    uᵢ (k₁,) and vᵢ (k₂,) are the rows of U (min, k₁) and V (min, k₂), with k₁ = ⌊√max⌋ and k₂ = ⌈max / k₁⌉. Both train:
    U starts at 0, so ΔW = 0, and V like LoRA's A. A random K has full rank: each row is its own k₁ × k₂ matrix of rank
    one. The number of parameters follows from the weight's shape; r enters only through s = lora_alpha / r.
    """

    title = "KRAdapter"
    adapter_layer_names = ("kradapter_U", "kradapter_V")

    def start(self, adapter: str, settings: LowRankSettings) -> Mapping[str, Tensor]:
        """U (min, k₁) = 0 and V (min, k₂) at the start."""
        smaller, larger = sorted((self.out_features, self.in_features))
        k1 = math.isqrt(larger)
        return {"kradapter_U": torch.zeros(smaller, k1), "kradapter_V": kaiming(smaller, math.ceil(larger / k1))}

    def added(self, adapter: str, x: Tensor) -> Tensor:
        """x ΔWᵀ / s, shape (..., m), for x of shape (..., n)."""
        change = self._product(adapter)
        return F.linear(x.to(change.dtype), change)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the layout of the base weight, in at least float32."""
        change = self._product(adapter)
        return self._matrix(self.settings[adapter].scaling * change.to(compute_dtype(change)))

    def _product(self, adapter: str) -> Tensor:
        """ΔW / s, shape (m, n)."""
        U, V = self.trained(adapter)
        rows = (U.unsqueeze(2) * V.unsqueeze(1)).flatten(1)[:, : max(self.out_features, self.in_features)]
        return rows if self.out_features <= self.in_features else rows.T


@dataclass(kw_only=True)
class KRAdapterConfig(ProductConfig, method="kradapter", layer=KRAdapterLinear):
    """`LowRankSettings` as a peft configuration."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """U and V, whose sizes follow from the weight's shape."""
        return {"kradapter_U": (None, None), "kradapter_V": (None, None)}


class KRAdapter(ProductMethod, name="kradapter", config=KRAdapterConfig):
    """An update of full rank from two factors; see `KRAdapterLinear`. Source: Albert et al. (2025)."""
