"""The loss around a solution, on a two-dimensional slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def landscape(parameters: Sequence[Tensor], loss: Callable[[], float], points: int, seed: int) -> dict[str, Any]:
    """loss(θ* + a d₁ + b d₂) for a and b in [−1, 1], `points` values each (paper, appendix H.1 and Figure 5).

    parameters: θ*, moved in place and put back bit for bit. The directions are drawn from `seed`, without touching
    the global generators, and filter-normalised: every row of every tensor of d has the norm of the same row of θ*
    (Li et al., 2018, Visualizing the Loss Landscape of Neural Nets). So a and b are shares of the parameters' size,
    and a row that is zero stays so.

    Returns {"axis": [a, ...], "loss": [[loss at (a, b) for each b] for each a]}; None where it is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    solution = [parameter.clone() for parameter in parameters]
    first, second = ([_direction(s, generator) for s in solution] for _ in range(2))
    axis = torch.linspace(-1, 1, points, dtype=torch.float64).tolist()

    def at(a: float, b: float) -> float | None:
        for parameter, s, d, e in zip(parameters, solution, first, second, strict=True):
            parameter.copy_(s + a * d + b * e)
        value = loss()
        return value if math.isfinite(value) else None

    try:
        return {"axis": axis, "loss": [[at(a, b) for b in axis] for a in axis]}
    finally:
        for parameter, s in zip(parameters, solution, strict=True):
            parameter.copy_(s)


def _direction(parameter: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
    scale: Tensor = parameter.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
    return drawn * scale
