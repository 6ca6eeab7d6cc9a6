"""ElaLoRA: during training, ranks move from where they matter least to where they matter most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from basisadapt.adapter.saved import Shape
from basisadapt.methods.allocation import AllocationSettings
from basisadapt.methods.method import ADAPTER
from basisadapt.methods.product import ProductConfig, ProductLinear, ProductMethod

SMOOTHING = 0.85  # of importance and of its uncertainty, as in AdaLoRA
# Ours:
GRACE = 7  # steps, 1 / (1 − SMOOTHING), before a new rank may be cut
MOVED = 0.25  # ranks moved at the first move, as a share of the modules


class ElaLoRALinear(ProductLinear):
    """ΔW = s B diag(E) A with up to R = ⌈(1 + spare) r⌉ ranks; E (R,) is 0 at the start and for unused ranks.

    A (R × n) and B (m × R) start normal with standard deviation 0.02.
    """

    title = "ElaLoRA"
    adapter_layer_names = ("elalora_A", "elalora_B", "elalora_E")

    def start(self, adapter: str, settings: AllocationSettings) -> Mapping[str, Tensor]:
        """A (R, n), B (m, R) and E (R,) at the start."""
        R = settings.room
        return {
            "elalora_A": 0.02 * torch.randn(R, self.in_features),
            "elalora_B": 0.02 * torch.randn(self.out_features, R),
            "elalora_E": torch.zeros(R),
        }

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """diag(E) A (R, n) and B (m, R)."""
        A, B, E = self.trained(adapter)
        return E.unsqueeze(1) * A, B


@dataclass(kw_only=True)
class ElaLoRAConfig(AllocationSettings, ProductConfig, method="elalora", layer=ElaLoRALinear):
    """`AllocationSettings` as a peft configuration."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A (R, n), B (m, R) and E (R,), with R = `room`, the ranks that a module can hold."""
        return {"elalora_A": (self.room, None), "elalora_B": (None, self.room), "elalora_E": (self.room,)}


class ElaLoRA(ProductMethod, name="elalora", config=ElaLoRAConfig, settings=AllocationSettings):
    """Every module starts with r of its R ranks; then ranks move between modules, and their total stays the same.

    The importance of an entry p with gradient g is Ī Ū, where I = |p g|, Ī is its running mean and Ū the running mean
    of |I − Ī|. The importance of a rank is that of its entry of E plus the means over its row of A and its column of B.
    A move takes the least important ranks of all modules, never a module's last, and gives as many to the modules with
    the highest mean importance that can hold more. The number of ranks moved falls from a quarter of the modules to
    zero as 1 − P³, with P the elapsed share of the steps in which ranks move. A new rank starts at E = 0.
    Source: Chang et al. (2025).

    The published method differs: it compares only the k least important ranks of each module, lets the most important
    of these choose the modules that grow, without a limit, and keeps ranks orthogonal by a penalty.
    """

    def __init__(self) -> None:
        self._allocator: Allocator | None = None

    def after_step(self, model: Any, settings: AllocationSettings, step: int, total: int) -> None:
        """Update the importance from this step's gradients, and move ranks if a move is due."""
        if self._allocator is None:
            layers = [module for module in model.modules() if isinstance(module, ElaLoRALinear)]
            self._allocator = Allocator(layers, settings.r)
        self._allocator.measure()
        first, last = settings.settle * total, (1 - settings.settle) * total
        if first < step <= last and step % settings.every == 0:
            over = (step - first) / (last - first)
            self._allocator.move(math.ceil(MOVED * (1 - over**3) * len(self._allocator.in_use)), step)
        self._allocator.zero_unused()


class Allocator:
    """Tracks which ranks of each layer are in use, and how important each is.

    in_use: bool, shape (layers, R).
    """

    def __init__(self, layers: Sequence[ElaLoRALinear], r: int) -> None:
        self._tensors = [list(layer.trained(ADAPTER)) for layer in layers]
        room = len(self._tensors[0][-1])
        self.in_use = torch.zeros(len(layers), room, dtype=torch.bool)
        self.in_use[:, :r] = True
        self._born = torch.full((len(layers), room), -GRACE)
        self._mean = [[torch.zeros_like(p) for p in tensors] for tensors in self._tensors]
        self._spread = [[torch.zeros_like(p) for p in tensors] for tensors in self._tensors]

    @torch.no_grad()
    def measure(self) -> None:
        """Update the running means of importance and uncertainty with the gradients of this step."""
        for tensors, means, spreads in zip(self._tensors, self._mean, self._spread, strict=True):
            for p, mean, spread in zip(tensors, means, spreads, strict=True):
                if p.grad is not None:
                    importance = (p * p.grad).abs()
                    mean.lerp_(importance, 1 - SMOOTHING)
                    spread.lerp_((importance - mean).abs(), 1 - SMOOTHING)

    def importance(self) -> Tensor:
        """The importance of every rank, shape (layers, R), float64 on the CPU."""
        scores = []
        for means, spreads in zip(self._mean, self._spread, strict=True):
            A, B, E = (mean * spread for mean, spread in zip(means, spreads, strict=True))
            scores.append((E + A.mean(1) + B.mean(0)).double().cpu())
        return torch.stack(scores)

    def move(self, count: int, step: int) -> None:
        """Move up to `count` ranks, one at a time, from where they are least important to where they are most."""
        scores = self.importance()
        average = (scores * self.in_use).sum(1) / self.in_use.sum(1)
        growing = iter(average.argsort(descending=True, stable=True).tolist() * count)
        for _ in range(count):
            to = next((layer for layer in growing if not self.in_use[layer].all()), None)
            may_go = self.in_use & (self.in_use.sum(1, keepdim=True) > 1) & (self._born <= step - GRACE)
            if to is not None:
                may_go[to] = False
            if to is None or not may_go.any():
                return
            least = int(scores.masked_fill(~may_go, math.inf).argmin())
            self.in_use.view(-1)[least] = False
            new = int(self.in_use[to].logical_not().nonzero()[0])
            self.in_use[to, new], self._born[to, new] = True, step

    @torch.no_grad()
    def zero_unused(self) -> None:
        """Set E = 0 for the ranks that are not in use."""
        for (_, _, E), in_use in zip(self._tensors, self.in_use, strict=True):
            E.mul_(in_use.to(E.device))
