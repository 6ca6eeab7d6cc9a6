"""AuroRA: a learned nonlinear map between LoRA's factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basisadapt.adapter.saved import Shape
from basisadapt.core.errors import require
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod, kaiming
from basisadapt.phi.basis import BASES
from basisadapt.phi.settings import MAX_FUNCTIONS, LowRankSettings

REACH = 3.0  # ours: the knots are evenly spaced on ±REACH; at the start |x Aᵀ| is about 0.6 for a normalized x


@dataclass(kw_only=True)
class AuroRASettings(LowRankSettings):
    """The settings of `LowRankSettings` and:

    - `num_knots` (int in [2, 4096], default 8): K, the number of splines per channel.

    Raises InputError for a value out of range.
    """

    num_knots: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        known = f"at least 2 and at most {MAX_FUNCTIONS}"
        require(2 <= self.num_knots <= MAX_FUNCTIONS, "num_knots", self.num_knots, known)


class AuroRALinear(ProductLinear):
    """y = x Wᵀ + b + s ANL(x Aᵀ) Bᵀ, with ANL(z) = tanh(W_b tanh z) + spline(z).

    A (r × n) is Kaiming-uniform, B (m × r) = 0, W_b (r × r) = I; spline_j(z) = Σ_k c_jk B₃((z_j − x_k) / h) with the
    cubic B-spline B₃, K knots x_k of spacing h, and c (r × K) = 0. All train. The map acts on activations, so there is
    no ΔW.

    This is the published form in training, and the published variant AuroRA-D afterwards; plain AuroRA then uses
    ΔW = s B ANL(A), which is not the function that was trained. The paper does not state the starts of W_b and c or the
    knots, and writes one spline weight per channel: these choices, and K weights per channel, are ours.
    """

    title = "AuroRA"
    not_a_weight = "acts on activations, through a nonlinear map"
    adapter_layer_names = ("aurora_A", "aurora_B", "aurora_W", "aurora_spline")

    def start(self, adapter: str, settings: AuroRASettings) -> Mapping[str, Tensor]:
        """A (r, n), B (m, r), W_b (r, r) and c (r, K) at the start."""
        r = settings.r
        return {
            "aurora_A": kaiming(r, self.in_features),
            "aurora_B": torch.zeros(self.out_features, r),
            "aurora_W": torch.eye(r),
            "aurora_spline": torch.zeros(r, settings.num_knots),
        }

    def bottleneck(self, adapter: str, h: Tensor) -> Tensor:
        """ANL(h) = tanh(W_b tanh h) + spline(h), for h = x Aᵀ of shape (..., r); same shape."""
        _, _, W, c = self.trained(adapter)
        knots = torch.linspace(-REACH, REACH, c.shape[1], dtype=h.dtype, device=h.device)
        splines = BASES["bspline"]()(h.unsqueeze(-1), 1 / (knots[1] - knots[0]), knots)
        return torch.tanh(torch.tanh(h) @ W.T.to(h.dtype)) + (splines * c.to(h.dtype)).sum(-1)


@dataclass(kw_only=True)
class AuroRAConfig(AuroRASettings, ProductConfig, method="aurora", layer=AuroRALinear):
    """`AuroRASettings` as a peft configuration."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A (r, n), B (m, r), W_b (r, r) and the spline weights c (r, K)."""
        return {
            "aurora_A": (self.r, None),
            "aurora_B": (None, self.r),
            "aurora_W": (self.r, self.r),
            "aurora_spline": (self.r, self.num_knots),
        }


class AuroRA(ProductMethod, name="aurora", config=AuroRAConfig, settings=AuroRASettings):
    """A nonlinear bottleneck, which cannot be merged; see `AuroRALinear`. Source: Dong et al. (2025)."""

    def weight_change(self, layer: Any) -> Tensor | None:
        """Always None: the method changes activations, not the weight."""
        return None
