"""AuroRA: a learned nonlinear map between LoRA's factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basisadapt.adapter.saved import Shape
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod, kaiming
from basisadapt.phi.basis import BASES
from basisadapt.phi.settings import MOST_FUNCTIONS, LowRankSettings, require

REACH = 3.0  # ours: the splines' knots lie evenly on ±REACH; x Aᵀ is about 0.6 in size for a normalised x at the start


@dataclass(kw_only=True)
class AuroRASettings(LowRankSettings):
    """num_knots: K, splines of each channel, at most 4,096. Raises InputError out of range."""

    num_knots: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        known = f"at least 2 and at most {MOST_FUNCTIONS}"
        require(2 <= self.num_knots <= MOST_FUNCTIONS, "num_knots", self.num_knots, known)


class AuroRALinear(ProductLinear):
    """y = x Wᵀ + b + s ANL(x Aᵀ) Bᵀ, with ANL(z) = tanh(W_b tanh z) + spline(z).

    A (r × n) Kaiming-uniform, B (m × r) = 0, W_b (r × r) = I; spline_j(z) = Σ_k c_jk B₃((z_j − x_k) / h), with the
    cubic B-spline B₃ and K knots x_k of distance h; c (r × K) = 0. All train. It acts on activations: there is no ΔW.
    This is the published form in training, and their variant AuroRA-D after it; theirs then takes s B ANL(A) for ΔW,
    which is another function than the one trained. The paper leaves the starts of W_b and c open, and the grid; it
    writes one spline weight a channel: all these, and K of them a channel, are ours.
    """

    title = "AuroRA"
    not_a_weight = "acts on activations, through a nonlinear map"
    adapter_layer_names = ("aurora_A", "aurora_B", "aurora_W", "aurora_spline")

    def start(self, adapter: str, settings: AuroRASettings) -> Mapping[str, Tensor]:
        """A, B, W_b and c."""
        r = settings.r
        return {
            "aurora_A": kaiming(r, self.in_features),
            "aurora_B": torch.zeros(self.out_features, r),
            "aurora_W": torch.eye(r),
            "aurora_spline": torch.zeros(r, settings.num_knots),
        }

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B."""
        A, B, _, _ = self.trained(adapter)
        return A, B

    def between(self, adapter: str, h: Tensor) -> Tensor:
        """ANL(h)."""
        _, _, W, c = self.trained(adapter)
        knots = torch.linspace(-REACH, REACH, c.shape[1], dtype=h.dtype, device=h.device)
        splines = BASES["bspline"]()(h.unsqueeze(-1), 1 / (knots[1] - knots[0]), knots)
        return torch.tanh(torch.tanh(h) @ W.T.to(h.dtype)) + (splines * c.to(h.dtype)).sum(-1)


@dataclass(kw_only=True)
class AuroRAConfig(AuroRASettings, ProductConfig, method="aurora", layer=AuroRALinear):
    """AuroRASettings."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A, B, W and the splines."""
        return {
            "aurora_A": (self.r, None),
            "aurora_B": (None, self.r),
            "aurora_W": (self.r, self.r),
            "aurora_spline": (self.r, self.num_knots),
        }


class AuroRA(ProductMethod, name="aurora", config=AuroRAConfig, settings=AuroRASettings):
    """A nonlinear bottleneck, see `AuroRALinear`; it cannot be merged. Source: Dong et al. (2025)."""

    def weight_change(self, layer: Any) -> Tensor | None:
        """None."""
        return None
