"""How straight the path of training is through parameter space."""

from __future__ import annotations

import torch
from torch import Tensor


class UpdatePath:
    """The path of a point θ through parameter space, stored as its start, its current point and its length.

    `start` and all later points are tensors of one shape. No step waits for a GPU.
    """

    def __init__(self, start: Tensor) -> None:
        self._start, self._here = start, start
        self._length = torch.zeros((), dtype=torch.float64, device=start.device)

    def move(self, to: Tensor) -> None:
        """Extend the path by a straight line to the point `to`."""
        self._length += torch.linalg.vector_norm(to - self._here, dtype=torch.float64)
        self._here = to

    def smoothness(self) -> Tensor:
        """‖θ_T − θ_0‖ / Σ_t ‖θ_t − θ_{t−1}‖, a float64 scalar.

        It is 1 for a straight path, about 1/√T for a random walk, and NaN for a point that never moved. Only paths with
        the same number of steps T can be compared. The paper's Table 17 grades "update smoothness" in words and defines
        no measure.
        """
        distance: Tensor = torch.linalg.vector_norm(self._here - self._start, dtype=torch.float64)
        return distance / self._length
