"""ABBA: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from basisadapt.adapter.saved import Shape
from basisadapt.core.errors import InputError, require
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod, kaiming
from basisadapt.phi.settings import LowRankSettings


@dataclass(kw_only=True)
class ABBASettings(LowRankSettings):
    """The settings of `LowRankSettings`, with r even: each pair of factors has rank r / 2, so the cost is LoRA's.

    Raises InputError for an odd r, or as `LowRankSettings`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r % 2 == 0, "r", self.r, "an even number for ABBA, half for each pair of factors")


class ABBALinear(ProductLinear):
    """ΔW = s (B₁A₁) ∘ (B₂A₂), elementwise; each pair has rank k = r / 2, and ΔW has rank up to k².

    At the start, B₁A₁ is the truncated singular value decomposition of W: B₁ = U_k Σ_k^½ and A₁ = Σ_k^½ V_kᵀ. A₂ is
    drawn like LoRA's A and B₂ = 0, so ΔW = 0. All four train. No dense product is needed: ΔW is s times the product of
    the Khatri-Rao products B_(i,ab) = B₁_ia B₂_ib (m × k²) and A_(ab,j) = A₁_aj A₂_bj (k² × n).

    Two choices are ours: s = lora_alpha / r as in LoRA, which falls with 1 / k as the published scale does, and the
    width of A₂, where the published one is √6 times as large.
    """

    title = "ABBA"
    adapter_layer_names = ("abba_A1", "abba_B1", "abba_A2", "abba_B2")

    def start(self, adapter: str, settings: ABBASettings) -> Mapping[str, Tensor]:
        """A₁ (k, n), B₁ (m, k), A₂ (k, n), B₂ (m, k). Raises InputError for a quantized W."""
        if self._quantised:
            raise InputError(f"{self.title} starts from the SVD of W, but {self.name!r} is quantized")
        k = settings.r // 2
        U, sigma, Vt = torch.linalg.svd(self._matrix(self.base_layer.weight.detach()).float(), full_matrices=False)
        root = sigma[:k].sqrt()
        return {
            "abba_A1": root.unsqueeze(1) * Vt[:k],
            "abba_B1": U[:, :k] * root,
            "abba_A2": kaiming(k, self.in_features),
            "abba_B2": torch.zeros(self.out_features, k),
        }

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The Khatri-Rao products A (k², n) and B (m, k²), whose product BA is ΔW / s."""
        A1, B1, A2, B2 = self.trained(adapter)
        return (A1.unsqueeze(1) * A2).flatten(0, 1), (B1.unsqueeze(2) * B2.unsqueeze(1)).flatten(1)


@dataclass(kw_only=True)
class ABBAConfig(ABBASettings, ProductConfig, method="abba", layer=ABBALinear):
    """`ABBASettings` as a peft configuration."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """Both pairs of factors: A₁, A₂ of shape (r / 2, n) and B₁, B₂ of shape (m, r / 2)."""
        a, b = (self.r // 2, None), (None, self.r // 2)
        return {"abba_A1": a, "abba_B1": b, "abba_A2": a, "abba_B2": b}


class ABBA(ProductMethod, name="abba", config=ABBAConfig, settings=ABBASettings, quantisable=False):
    """A Hadamard product that starts from W's own singular vectors; see `ABBALinear`. Source: Singhal et al. (2025)."""
