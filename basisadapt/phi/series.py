"""A transfer function compiled to a short Chebyshev series on the range in use.

f(z) ≈ Σ_d c_d T_d(z / R) for |z| ≤ R. Every element then costs about D multiply-adds, whatever N and whatever the
basis. The coefficients are a linear image of f at D Chebyshev nodes, so autograd carries their gradients, which are
the moments Σ_ij G_ij T_d(z_ij / R), back to α, ω and the grid. Source: Trefethen, Approximation Theory and
Approximation Practice (2013), chapters 3, 4 and 8.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from basisadapt.phi.bank import Transfer

DEGREES = (8, 16, 32, 64, 128)
PEAKS = 64  # at most so many grid points are check points
PROBE = 10  # the probe's tolerance, as a multiple: it guards gradients, not values


def coefficients(transfer: Transfer, radius: float, tolerance: float) -> Tensor | None:
    """The coefficients c of shape (D,), float64, with the smallest D of DEGREES that is accurate to `tolerance`.

    `tolerance` is relative to the largest value on the range, and is held against f itself between the nodes and at
    the grid points in range, where narrow functions have their peaks. A second function with other amplitudes is held
    against PROBE times that: the gradients need every basis function resolved, also where α cancels them or is zero.
    None if no D suffices: evaluate directly then.
    """
    reference = transfer.double()
    index = torch.arange(len(transfer.alpha), dtype=torch.float64, device=transfer.alpha.device)
    with torch.no_grad():
        # f is linear in α: both functions are evaluated at once, as the two columns of one.
        both = torch.stack([reference.alpha, torch.cos(index**2)], dim=1)
        columns = reference.with_parameters(both, reference.omega, reference.grid)
        for degree in DEGREES:
            error, probe_error = _errors(columns, radius, degree)
            if error <= tolerance and probe_error <= PROBE * tolerance:
                break
        else:
            return None
    return _interpolate(reference, radius, degree)


def _errors(columns: Transfer, radius: float, degree: int) -> list[float]:
    """max |series − f| over the check points, relative to max |f|, of every column."""
    between = radius * torch.cos(torch.linspace(0, math.pi, 2 * degree + 1, dtype=torch.float64))
    peaks = columns.grid.detach() / columns.gain
    peaks = peaks[peaks.abs() <= radius]
    # A sample of them is enough, for the probe has an amplitude everywhere; so the cost grows with N and not N².
    peaks = peaks[:: 1 + len(peaks) // PEAKS]
    points = torch.cat([between.to(peaks.device), peaks])
    truth = columns(points)
    terms = signs(degree, points.device).unsqueeze(1) * _interpolate(columns, radius, degree)
    values = basis(points, 1 / radius, scratch(degree, len(points), points))
    error = (values.T @ terms - truth).abs().amax(0) / truth.abs().amax(0)
    return torch.nan_to_num(error, nan=0.0).tolist()  # 0 / 0: a function that is zero is exact


def _interpolate(transfer: Transfer, radius: float, degree: int) -> Tensor:
    nodes, transform = _cosine_transform(degree, transfer.alpha.device)
    return transform @ transfer(radius * nodes)


@functools.cache
def _cosine_transform(degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The D Chebyshev nodes on [−1, 1] and the matrix that takes values there to coefficients."""
    angle = math.pi * (torch.arange(degree, dtype=torch.float64) + 0.5) / degree
    transform = torch.cos(torch.arange(degree, dtype=torch.float64).unsqueeze(1) * angle) * (2 / degree)
    transform[0] /= 2
    return torch.cos(angle).to(device), transform.to(device)


def scratch(degree: int, count: int, like: Tensor) -> Tensor:
    """Room for `basis` at up to `count` points: making it anew for every piece would cost as much as filling it."""
    room = like.new_empty(degree, count)
    room[0] = 1
    return room


def basis(z: Tensor, scale: float, room: Tensor) -> Tensor:
    """±T_0(t) .. ±T_{D−1}(t) at t = scale · z, |t| ≤ 1, with the signs of `signs`; z: (n,), result: (D, n) in `room`.

    The signs + + − − + + − − … turn T_d = 2t T_{d−1} − T_{d−2} into one fused multiply-add into place.
    """
    values = room[:, : len(z)]
    row = values.unbind()
    torch.mul(z, scale, out=row[1])
    twice = 2 * row[1]
    for d in range(2, len(row)):
        torch.addcmul(row[d - 2], twice, row[d - 1], value=-1 if d % 2 == 0 else 1, out=row[d])
    return values


@functools.cache
def signs(degree: int, device: torch.device) -> Tensor:
    """The signs of `basis`, shape (D,), float64."""
    return torch.tensor([1.0 if d % 4 < 2 else -1.0 for d in range(degree)], dtype=torch.float64, device=device)


def derivative(coefficients: Tensor) -> Tensor:
    """The coefficients of d/dt Σ_d c_d T_d(t), shape (D,), the last one 0."""
    c = coefficients.detach().tolist()
    slope = [0.0] * (len(c) + 2)
    for d in range(len(c) - 1, 0, -1):
        slope[d - 1] = slope[d + 1] + 2 * d * c[d]
    slope[0] /= 2
    return coefficients.new_tensor(slope[: len(c)])
