"""How far an update φ(BA) is from a multiple of BA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR = 0.01  # a nonlinear share below it is reported as LoRA at another scale
NEGLIGIBLE = 1e-12  # an entry too small to change a weight in any precision, such as rounding of a series at BA = 0


@torch.no_grad()
def linear_fit(update: Tensor, product: Tensor) -> tuple[float, float]:
    """The least-squares fit ΔW ≈ c P: c and the share of ΔW that it leaves unexplained.

    c = ⟨ΔW, P⟩ / ⟨P, P⟩; the share is ‖ΔW − c P‖ / ‖ΔW‖ in Frobenius norms, from 0 for ΔW = c P to 1. In float64.

    - `update`: ΔW, shape (m, n).
    - `product`: P = s · BA, shape (m, n).

    c is NaN if P = 0, and the share is NaN if ΔW = 0.
    """
    norm = torch.linalg.vector_norm
    update, product = update.double().flatten(), product.double().flatten()
    if norm(update, math.inf) < NEGLIGIBLE:
        update = torch.zeros_like(update)
    size, length = product.dot(product).item(), norm(update).item()
    c = update.dot(product).item() / size if size else math.nan
    left = norm(torch.sub(update, product, alpha=c)).item() if size else length
    return c, left / length if length else math.nan
