"""The settings of methods that move ranks between modules while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from basisadapt.core.errors import require
from basisadapt.phi.settings import LowRankSettings


@dataclass(kw_only=True)
class AllocationSettings(LowRankSettings):
    """The settings of `LowRankSettings`, with r the final mean number of ranks per module, and:

    - `spare` (float in [0, 100], default 0.5): a module can hold ⌈(1 + spare) r⌉ ranks.
    - `settle` (float in [0, 0.5), default 0.2): no rank moves in the first and the last `settle` share of the steps.
    - `every` (int ≥ 1, default 1): steps between two moves.

    Raises InputError for a value out of range.
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
        """The ranks that a module can hold, ⌈(1 + spare) r⌉."""
        return math.ceil((1 + self.spare) * self.r)
