"""The settings of methods that move ranks between modules while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from basisadapt.phi.settings import LowRankSettings, require


@dataclass(kw_only=True)
class AllocationSettings(LowRankSettings):
    """r: ranks per module on average, when all is settled. Raises InputError out of range.

    spare: a module has room for ⌈(1 + spare) r⌉ ranks, spare at most 100. settle: the first and the last so many of the
    steps, as a share, leave the ranks alone. every: steps between two moves.
    """

    spare: float = 0.5
    settle: float = 0.2
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.spare <= 100, "spare", self.spare, "at least 0 and at most 100")
        require(0 <= self.settle < 0.5, "settle", self.settle, "in [0, 0.5)")
        require(self.every >= 1, "every", self.every, "at least 1")

    @property
    def room(self) -> int:
        """⌈(1 + spare) r⌉."""
        return math.ceil((1 + self.spare) * self.r)
