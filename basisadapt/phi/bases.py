"""The five bases of the paper's Table 13, and two controls: the sine of SineLoRA, and no nonlinearity at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from basisadapt.core.ranges import Range
from basisadapt.phi.basis import TransferBasis

TINY = 1e-300  # added to a float64 it changes only zero


class Sinc(TransferBasis, name="sinc"):
    """b(u) = sin(πu) / (πu), b(0) = 1: the normalized sinc of the sampling theorem (paper, eq. 2 and 4)."""

    def forward(self, u: Tensor) -> Tensor:
        """sin(πu) / (πu), elementwise."""
        return torch.sinc(u)

    def values(self, u: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
        """b = sin(v) / v and b' = π (cos(v) − sin(v) / v) / v at v = πu."""
        v = u.mul_(math.pi).add_(TINY)
        b = torch.sin(v).div_(v)
        # For |v| < 1e-8 both the cosine and the quotient are exactly 1.
        return b, torch.cos(v).sub_(b).div_(v).mul_(math.pi) if slopes else b


class GaussianRBF(TransferBasis, name="gaussian_rbf"):
    """b(u) = exp(−u²) (paper, Table 13)."""

    support: ClassVar[float] = 6.5

    def forward(self, u: Tensor) -> Tensor:
        """exp(−u²), elementwise."""
        return torch.exp(-u.square())


class BSpline(TransferBasis, name="bspline"):
    """The centered cubic cardinal B-spline B₃ (paper, Table 13): B₃(u) = ((2 − |u|)₊³ − 4 (1 − |u|)₊³) / 6.

    Support [−2, 2], twice continuously differentiable, B₃(0) = 2/3. Source: Schoenberg (1946).
    """

    support: ClassVar[float] = 2.0
    jumps: ClassVar[Mapping[float, float]] = {-2.0: 1.0, -1.0: -4.0, 0.0: 6.0, 1.0: -4.0, 2.0: 1.0}

    def forward(self, u: Tensor) -> Tensor:
        """B₃(u), elementwise; zero beyond ±2."""
        distance = u.abs()
        return ((2 - distance).clamp_min(0).pow(3) - 4 * (1 - distance).clamp_min(0).pow(3)) / 6


class Fourier(TransferBasis, name="fourier", argument="phase"):
    """cos(ωᵢ x + ϕᵢ); the phase ϕᵢ is the grid point xᵢ, in radians (paper, Table 13)."""

    # ω = 30 gives about five periods on [−0.5, 0.5].
    search: ClassVar[Mapping[str, Range]] = {"omega_init": Range(0.3, 30.0, log=True)}

    def forward(self, u: Tensor) -> Tensor:
        """cos(u), elementwise, at u = ωᵢ x + ϕᵢ."""
        return torch.cos(u)

    def values(self, u: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
        """b = cos(u) and b' = −sin(u)."""
        return torch.cos(u), torch.sin(u).neg_() if slopes else u


class Polynomial(TransferBasis, name="polynomial", argument="scaled"):
    """(1 + ωᵢ x)³ (paper, Table 13), without a grid. However large N is, the sum is one cubic: 4 degrees of freedom."""

    # It grows without bound, so a large ω or gain makes training unstable.
    search: ClassVar[Mapping[str, Range]] = {
        "omega_init": Range(0.1, 2.0, log=True),
        "gain": Range(1.0, 30.0, log=True),
        "num_basis": Range(4, 16, log=True),
    }

    def forward(self, u: Tensor) -> Tensor:
        """(1 + u)³, elementwise, at u = ωᵢ x."""
        return (1 + u).pow(3)


class Sinusoid(TransferBasis, name="sinusoid", argument="scaled"):
    """sin(ωᵢ x), without a grid. With N = 1 it is SineLoRA's function. Source: Ji et al. (2025)."""

    search: ClassVar[Mapping[str, Range]] = {"omega_init": Range(10.0, 1000.0, log=True)}

    def forward(self, u: Tensor) -> Tensor:
        """sin(u), elementwise, at u = ωᵢ x."""
        return torch.sin(u)


class Linear(TransferBasis, name="linear", argument="scaled"):
    """ωᵢ x, without a grid: φ(BA) = (Σᵢ αᵢ ωᵢ) BA.

    With N = 1 and `learn_omega: false` it is LoRA with one learned scale per module. It is the control that separates
    the effect of an update's size from that of its nonlinearity.
    """

    def forward(self, u: Tensor) -> Tensor:
        """u itself, where u = ωᵢ x."""
        return u
