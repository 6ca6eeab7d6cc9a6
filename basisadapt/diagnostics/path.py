"""Whether training walks straight or wobbles."""

from __future__ import annotations

import torch
from torch import Tensor


class Path:
    """The way of a point θ through parameter space, kept as two points and a length.

    Nothing is read back from a GPU until `smoothness` is.
    """

    def __init__(self, start: Tensor) -> None:
        self._start, self._here = start, start
        self._length = torch.zeros((), dtype=torch.float64, device=start.device)

    def move(self, to: Tensor) -> None:
        """Go on to the point `to`."""
        self._length += torch.linalg.vector_norm(to - self._here, dtype=torch.float64)
        self._here = to

    def smoothness(self) -> Tensor:
        """‖θ_T − θ_0‖ / Σ_t ‖θ_t − θ_{t−1}‖, a scalar: 1 for a straight way, about 1/√T for a random walk, NaN at rest.

        Only ways of equally many steps compare. The paper's Table 17 grades "update smoothness" in words and defines
        no measure.
        """
        distance: Tensor = torch.linalg.vector_norm(self._here - self._start, dtype=torch.float64)
        return distance / self._length
