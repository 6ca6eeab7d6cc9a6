"""How far an update is from a multiple of the product that it is a function of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR = 0.01  # a nonlinear share below which φ(BA) is LoRA at another scale, in words too
NEGLIGIBLE = 1e-12  # an entry that changes no weight of any precision, as a series' rounding where BA = 0


@torch.no_grad()
def linear_fit(update: Tensor, product: Tensor) -> tuple[float, float]:
    """c, the best of all ΔW ≈ c P by least squares, and the share of ΔW that it leaves out.

    c = ⟨ΔW, P⟩ / ⟨P, P⟩ and ‖ΔW − c P‖ / ‖ΔW‖, from 0 for ΔW = c P to 1, with Frobenius norms, in float64. update: ΔW;
    product: P = s · BA, of its shape. Where P = 0 no c is best, and it is NaN; so is the share where ΔW = 0.
    """
    norm = torch.linalg.vector_norm
    update, product = update.double().flatten(), product.double().flatten()
    if norm(update, math.inf) < NEGLIGIBLE:
        update = torch.zeros_like(update)
    size, length = product.dot(product).item(), norm(update).item()
    c = update.dot(product).item() / size if size else math.nan
    left = norm(torch.sub(update, product, alpha=c)).item() if size else length
    return c, left / length if length else math.nan
