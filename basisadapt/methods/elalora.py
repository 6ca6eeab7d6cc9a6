"""ElaLoRA: ranks are cut where they matter least and grown where they matter most, while training."""

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
    """ΔW = s B diag(E) A, with room for R = ⌈(1 + spare) r⌉ ranks; E (R,) = 0 at the start, and for ranks not in use.

    A (R × n) and B (m × R) start normal with standard deviation 0.02.
    """

    title = "ElaLoRA"
    adapter_layer_names = ("elalora_A", "elalora_B", "elalora_E")

    def start(self, adapter: str, settings: AllocationSettings) -> Mapping[str, Tensor]:
        """A, B and E."""
        R = settings.room
        return {
            "elalora_A": 0.02 * torch.randn(R, self.in_features),
            "elalora_B": 0.02 * torch.randn(self.out_features, R),
            "elalora_E": torch.zeros(R),
        }

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """diag(E) A and B."""
        A, B, E = self.trained(adapter)
        return E.unsqueeze(1) * A, B


@dataclass(kw_only=True)
class ElaLoRAConfig(AllocationSettings, ProductConfig, method="elalora", layer=ElaLoRALinear):
    """AllocationSettings."""

    def saved_shapes(self) -> Mapping[str, Shape]:
        """A, B and E, with room for more ranks than r."""
        return {"elalora_A": (self.room, None), "elalora_B": (None, self.room), "elalora_E": (self.room,)}


class ElaLoRA(ProductMethod, name="elalora", config=ElaLoRAConfig, settings=AllocationSettings):
    """Every module starts with r of its R ranks; then ranks move from module to module, their sum unchanged.

    The importance of an entry p with gradient g is Ī Ū, with I = |p g|, Ī its running mean and Ū that of |I − Ī|; that
    of a rank is the sum of its entry of E's and of the means over its row of A and column of B. A move takes the least
    important ranks of all, but no module's last, and gives as many to the modules with the most important ranks on
    average that have room. Moves become smaller, from a quarter of the modules to none as 1 − P³ does, with P the part
    of the moving steps that is over. A new rank starts at E = 0. Source: Chang et al. (2025).

    Otherwise than there: they compare only the k least important ranks of each module, and of these the most important
    say which modules grow, without a limit; a new rank is orthogonal to the others, and a penalty keeps it so.
    """

    def __init__(self) -> None:
        self._allocator: Allocator | None = None

    def after_step(self, model: Any, settings: AllocationSettings, step: int, total: int) -> None:
        """Measure importance, and move ranks where it is time to."""
        if self._allocator is None:
            layers = [module for module in model.modules() if isinstance(module, ElaLoRALinear)]
            self._allocator = Allocator(layers, settings.r)
        self._allocator.measure()
        first, last = settings.settle * total, (1 - settings.settle) * total
        if first < step <= last and step % settings.every == 0:
            over = (step - first) / (last - first)
            self._allocator.move(math.ceil(MOVED * (1 - over**3) * len(self._allocator.in_use)), step)
        self._allocator.silence()


class Allocator:
    """Which ranks of each layer are in use, and how important each is.

    in_use: (layers, R), whether a rank is.
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
        """Take the gradients of this step into account."""
        for tensors, means, spreads in zip(self._tensors, self._mean, self._spread, strict=True):
            for p, mean, spread in zip(tensors, means, spreads, strict=True):
                if p.grad is not None:
                    importance = (p * p.grad).abs()
                    mean.lerp_(importance, 1 - SMOOTHING)
                    spread.lerp_((importance - mean).abs(), 1 - SMOOTHING)

    def importance(self) -> Tensor:
        """Of every rank, (layers, R), on the CPU."""
        scores = []
        for means, spreads in zip(self._mean, self._spread, strict=True):
            A, B, E = (mean * spread for mean, spread in zip(means, spreads, strict=True))
            scores.append((E + A.mean(1) + B.mean(0)).double().cpu())
        return torch.stack(scores)

    def move(self, count: int, step: int) -> None:
        """Move up to `count` ranks, one after the other, from where they are least important to where they are most."""
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
    def silence(self) -> None:
        """E = 0 for the ranks that are not in use."""
        for (_, _, E), in_use in zip(self._tensors, self.in_use, strict=True):
            E.mul_(in_use.to(E.device))
