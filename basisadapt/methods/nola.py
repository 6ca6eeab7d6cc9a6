"""NoLA: LoRA's factors as combinations of frozen random matrices."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from basisadapt.adapter.saved import Shape
from basisadapt.core.errors import require
from basisadapt.methods.method import RandomBasisSettings
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod, kaiming
from basisadapt.phi.settings import MAX_RANK


@dataclass(kw_only=True)
class NoLASettings(RandomBasisSettings):
    """The settings of `RandomBasisSettings` and:

    - `num_random` (int in [1, 16384], default 64): K, the number of random matrices in each factor.

    Raises InputError for a value out of range.
    """

    num_random: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.num_random <= MAX_RANK, "num_random", self.num_random, f"at least 1 and at most {MAX_RANK}")


class NoLALinear(ProductLinear):
    """ΔW = s B A, A = A₀ + Σ_k a_k U_k / √K and B = Σ_k b_k V_k / √K, k = 1..K.

    A₀ (r × n) is drawn like LoRA's A; U_k (r × n) and V_k (m × r) are uniform on [−1, 1]. These are frozen, follow from
    the seed and the module's name, and are not saved. a and b (K,) train and start at 0, so ΔW = 0.
    """

    title = "NoLA"
    adapter_layer_names = ("nola_a", "nola_b")
    other_param_names = (*ProductLinear.other_param_names, "frozen_A", "frozen_B")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.frozen_A = BufferDict({}, persistent=False)
        self.frozen_B = BufferDict({}, persistent=False)

    def start(self, adapter: str, settings: NoLASettings) -> Mapping[str, Tensor]:
        """a = b = 0, shape (K,). Also makes the frozen A₀, U_1, ..., U_K (K + 1, r, n) and V_1, ..., V_K (K, m, r)."""
        K, r, m, n = settings.num_random, settings.r, self.out_features, self.in_features
        base = self.base_layer.weight
        if base.is_meta:
            self.frozen_A[adapter], self.frozen_B[adapter] = base.new_empty(K + 1, r, n), base.new_empty(K, m, r)
        else:
            seed = (settings.basis_seed or 0) + zlib.crc32(self.name.encode())
            generator = torch.Generator().manual_seed(seed)
            first = kaiming(r, n, generator).view(1, r, n)
            frozen_A = torch.cat([first, kaiming(K * r * n, 1, generator).view(K, r, n)])
            frozen_B = kaiming(K * m * r, 1, generator).view(K, m, r)
            self.frozen_A[adapter], self.frozen_B[adapter] = frozen_A.to(base.device), frozen_B.to(base.device)
        return {"nola_a": torch.zeros(K), "nola_b": torch.zeros(K)}

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r), combined from the frozen matrices and the current coefficients."""
        a, b = self.trained(adapter)
        first, *_ = frozen_A = self.frozen_A[adapter].to(a.dtype)
        scale = len(a) ** -0.5
        A = first + scale * torch.tensordot(a, frozen_A[1:], 1)
        return A, scale * torch.tensordot(b, self.frozen_B[adapter].to(b.dtype), 1)


@dataclass(kw_only=True)
class NoLAConfig(NoLASettings, ProductConfig, method="nola", layer=NoLALinear):
    """`NoLASettings` as a peft configuration."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """The coefficients a and b, shape (K,)."""
        return {"nola_a": (self.num_random,), "nola_b": (self.num_random,)}


class NoLA(ProductMethod, name="nola", config=NoLAConfig, settings=NoLASettings):
    """Trains coefficients of random matrices, as few as one likes at any rank; see `NoLALinear`.

    Source: Koohpayegani et al. (2024).
    """
