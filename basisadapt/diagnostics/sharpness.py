"""How sharply a loss bends: the largest eigenvalue of its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEP = 1e-3  # the distance of the finite difference from θ, relative to ‖θ‖


def largest_eigenvalue(
    parameters: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]], iterations: int, seed: int
) -> float:
    """λ, the eigenvalue of the Hessian at θ that is largest in magnitude, by power iteration.

    Gradient descent with a learning rate above 2 / λ leaves a minimum with this λ.

    - `parameters`: θ, moved in place and restored bit for bit.
    - `gradients`: computes the gradients of the loss at the current parameters, one for each.
    - `iterations`: steps of power iteration.
    - `seed`: of the first vector; the global generators are not touched.

    Hessian-vector products are central differences, Hv ≈ (∇L(θ + hv) − ∇L(θ − hv)) / 2h, so the gradients need not be
    differentiable. Returns vᵀHv of the last vector v; NaN if a gradient is not finite.
    """
    here = [parameter.detach().clone() for parameter in parameters]
    step = STEP * max(_norm(here), 1.0)
    generator = torch.Generator().manual_seed(seed)
    vector = _unit([torch.randn(p.shape, generator=generator).to(p) for p in here])
    value = math.nan

    def gradients_at(distance: float) -> Sequence[Tensor]:
        _move(parameters, here, vector, distance)
        return gradients()

    try:
        for _ in range(iterations):
            ahead, behind = map(gradients_at, (step, -step))
            product = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
            value = sum(float((v * p).sum(dtype=torch.float64)) for v, p in zip(vector, product, strict=True))
            if not math.isfinite(value):
                return math.nan
            if not _norm(product):
                return 0.0
            vector = _unit(product)
        return value
    finally:
        _move(parameters, here, here, 0.0)


@torch.no_grad()
def _move(parameters: Sequence[Tensor], here: Sequence[Tensor], vector: Sequence[Tensor], step: float) -> None:
    for parameter, start, direction in zip(parameters, here, vector, strict=True):
        parameter.copy_(start + step * direction if step else start)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for t in tensors))


def _unit(tensors: Sequence[Tensor]) -> list[Tensor]:
    norm = _norm(tensors)
    return [tensor / norm for tensor in tensors]
