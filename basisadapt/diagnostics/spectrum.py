"""How many directions an update has, and how much of it is a mere constant."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_rank(matrix: Tensor) -> float:
    """S(M) = ‖M‖_F² / ‖M‖₂² (paper, eq. 5), in float64: 1 for rank one, up to min(m, n); 0 for the zero matrix."""
    gram = _gram(matrix)
    largest = torch.linalg.eigvalsh(gram)[-1].item()
    return gram.trace().item() / largest if largest > 0 else 0.0


def dc_share(matrix: Tensor) -> float:
    """‖mean(M)‖² / ‖M‖², the part of ‖M‖_F² that a constant matrix holds: in [0, 1]; 0 for the zero matrix."""
    matrix = matrix.double()
    total = matrix.square().sum().item()
    return matrix.numel() * matrix.mean().item() ** 2 / total if total > 0 else 0.0


def _gram(matrix: Tensor) -> Tensor:
    """M Mᵀ or Mᵀ M, whichever is smaller: its eigenvalues are the squared singular values."""
    matrix = matrix.double()
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
