"""The singular values of an update, what follows from them, and the share of it that is constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQUARINGS = 25


def singular_values(matrix: Tensor) -> Tensor:
    """σ₁ ≥ σ₂ ≥ … of a matrix M (m, n), shape (min(m, n),), float64.

    They are the square roots of the eigenvalues of the Gram matrix, which is faster than an SVD. Values below 1e-8 σ₁
    are rounding.
    """
    gram, largest = _gram(matrix)
    sigma: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
    return largest * sigma


def stable_rank(sigma: Tensor) -> float:
    """S(M) = ‖M‖_F² / ‖M‖₂² = Σ (σᵢ / σ₁)² (paper, eq. 5), from 1 for rank one to min(m, n); 0 for the zero matrix.

    sigma: the singular values of M in descending order.
    """
    return (sigma / sigma[0]).square().sum().item() if sigma[0] > 0 else 0.0


def stable_rank_of(matrix: Tensor) -> float:
    """S(M) of a matrix M (m, n), see `stable_rank`; on a GPU, where eigenvalues are slow, from σ₁ alone."""
    if not matrix.is_cuda:
        return stable_rank(singular_values(matrix))
    matrix = matrix.double()
    sigma = largest_singular_value(matrix)
    return (matrix / sigma).square().sum().item() if sigma > 0 else 0.0


def largest_singular_value(matrix: Tensor) -> Tensor:
    """σ₁ of a matrix (m, n), a float64 scalar, from matrix products alone; the relative error is below 1e-8.

    σ₁² is the Rayleigh quotient of the longest column of G^(2^SQUARINGS), where G is the Gram matrix.
    """
    gram, largest = _gram(matrix)
    power = gram
    for _ in range(SQUARINGS):
        power = power / power.diagonal().max().clamp_min(torch.finfo(power.dtype).tiny)
        power = power @ power
    column = power[:, power.diagonal().argmax()]
    length = column.square().sum()
    return largest * ((column @ gram @ column) / length.where(length > 0, 1.0)).clamp_min(0).sqrt()


def _gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller Gram matrix of M / max |M|, whose squares neither overflow nor vanish, and max |M|; in float64."""
    matrix = matrix.double()
    largest = matrix.abs().max()
    matrix = matrix / largest.where(largest > 0, 1.0)
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix, largest


def captured(sigma: Tensor) -> Tensor:
    """The share of ‖M‖² that the best approximation of rank k captures, for k = 1, 2, ... (Eckart & Young, 1936).

    Σ_{i≤k} σᵢ² / Σ σᵢ², in the shape and dtype of `sigma`, the singular values in descending order; zeros for the zero
    matrix.
    """
    energy = sigma.square().cumsum(0)
    return energy / energy[-1] if energy[-1] > 0 else energy


def power_exponent(sigma: Tensor) -> float:
    """p of the power law σᵢ ∝ i^−p, by least squares of log σᵢ on log i; NaN with fewer than two usable σᵢ.

    The fit uses i = 1, 2, 4, ... up to half of the values, without those below 1e-6 σ₁. So every octave has the same
    weight, and the end, where any spectrum drops to its smallest value, has none. sigma: in descending order.
    """
    index = 2.0 ** torch.arange(64, dtype=torch.float64, device=sigma.device)
    index = index[index <= max(len(sigma) // 2, 1)]
    seen = sigma[index.long() - 1]
    told = seen > 1e-6 * sigma[0]
    if told.sum() < 2:
        return math.nan
    x, y = index[told].log(), seen[told].log()
    x = x - x.mean()
    return -((x @ y) / x.square().sum()).item()


def normalised(sigma: Tensor, count: int) -> list[float]:
    """The first `count` values of σᵢ / σ₁ (paper, Figure 4); empty for the zero matrix. sigma: in descending order."""
    return (sigma[:count] / sigma[0]).tolist() if sigma[0] > 0 else []


def dc_share(matrix: Tensor) -> float:
    """m n mean(M)² / ‖M‖_F², the share of ‖M‖_F² in the constant part of M (m, n): in [0, 1]; 0 for the zero matrix."""
    matrix = matrix.double()
    total = matrix.square().sum().item()
    return matrix.numel() * matrix.mean().item() ** 2 / total if total > 0 else 0.0
