"""Strategies that place the grid points x₁..x_N on [−I, I] (paper, Table 14)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from basisadapt.core.ranges import Range
from basisadapt.core.registry import Registered, Registry

GRIDS: Registry[GridStrategy] = Registry("grid")


class GridStrategy(Registered, ABC):
    """Places N points on [−I, I]. Subclass it with a name and define `points`.

    - `trainable` (default False): the points are trained parameters that start there.
    - `search` (default empty): search ranges of settings with this grid, as in `TransferBasis`.
    """

    registry = GRIDS
    trainable: ClassVar[bool]
    search: ClassVar[Mapping[str, Range]] = {}

    def __init_subclass__(cls, *, trainable: bool = False, **kwargs: Any) -> None:
        """Register the class as `Registered` does, and whether its points train."""
        cls.trainable = trainable
        super().__init_subclass__(**kwargs)

    @abstractmethod
    def points(self, num: int, interval: float, generator: torch.Generator) -> Tensor:
        """The `num` points on [−interval, interval], distinct, shape (num,), float64 on the CPU.

        Random numbers come only from `generator`, so equal seeds give equal grids.
        """


class Uniform(GridStrategy, name="uniform"):
    """xᵢ = −I + 2Ii / (N − 1), i = 0..N − 1; for N = 1 the single point is 0."""

    def points(self, num: int, interval: float, generator: torch.Generator) -> Tensor:
        """Evenly spaced points that include ±interval, shape (num,); `generator` is not used."""
        return _uniform(num, interval)


class Chebyshev(GridStrategy, name="chebyshev"):
    """xᵢ = I cos(π (2i − 1) / (2N)), i = 1..N: the roots of T_N on [−I, I], denser toward the ends."""

    def points(self, num: int, interval: float, generator: torch.Generator) -> Tensor:
        """The Chebyshev nodes in descending order, shape (num,); `generator` is not used."""
        i = torch.arange(1, num + 1, dtype=torch.float64)
        return interval * torch.cos(math.pi * (2 * i - 1) / (2 * num))


class Random(GridStrategy, name="random"):
    """xᵢ ~ U(−I, I), independent."""

    def points(self, num: int, interval: float, generator: torch.Generator) -> Tensor:
        """Independent uniform points, unsorted, shape (num,), drawn from `generator`."""
        return interval * (2 * torch.rand(num, generator=generator, dtype=torch.float64) - 1)


class Jittered(GridStrategy, name="jittered"):
    """The uniform grid of spacing τ, each point moved by U(−τ/10, τ/10) and clamped to [−I, I] (paper, Table 21)."""

    def points(self, num: int, interval: float, generator: torch.Generator) -> Tensor:
        """Evenly spaced points plus noise drawn from `generator`, shape (num,)."""
        spacing = 2 * interval / max(num - 1, 1)
        noise = 2 * torch.rand(num, generator=generator, dtype=torch.float64) - 1
        return (_uniform(num, interval) + 0.1 * spacing * noise).clamp(-interval, interval)


class Learned(GridStrategy, name="learned", trainable=True):
    """The uniform grid at the start; then the points train, like α and ω."""

    search: ClassVar[Mapping[str, Range]] = {"transfer_lr": Range(0.01, 3.0, log=True)}  # x moves as well

    def points(self, num: int, interval: float, generator: torch.Generator) -> Tensor:
        """The points at the start, those of the uniform grid, shape (num,); `generator` is not used."""
        return _uniform(num, interval)


def _uniform(num: int, interval: float) -> Tensor:
    if num == 1:
        return torch.zeros(1, dtype=torch.float64)
    return torch.linspace(-interval, interval, num, dtype=torch.float64)
