"""Transfer functions compiled to short Chebyshev series on the range in use, all modules of a bank at once.

F(z) ≈ Σ_d c_d T_d(z / R), d = 0..D−1, for |z| ≤ R. Every element of a weight then costs about D multiply-adds,
whatever N and whatever the basis. The coefficients are a linear image of F at Chebyshev nodes, so autograd carries
their gradients, which are the moments Σ_ij G_ij T_d(z_ij / R), back to α, ω and the grid. Nothing here waits for a GPU:
R and D are tensors. Source: Trefethen, Approximation Theory and Approximation Practice (2013), chapters 3, 4 and 8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from basisadapt.phi.bank import Transfer
from basisadapt.phi.basis import width
from basisadapt.phi.extent import Extent

POINTS = (16, 32, 64, 128)  # numbers of nodes that are tried
POWER_COUNT = 16  # monomials are well conditioned for short series only
LEAST_VARIATION = 1e-3  # of a slope, relative to its size: below, rounding would decide
PEAKS = 64  # at most so many grid points are check points
COARSE = 2.0  # nodes further apart than so many widths of a basis function might pass over one

Tables = Callable[..., Transfer]  # the functions of M modules, from three tables and their gains


class Packed:
    """The layout of a packed series, a row of SIZE numbers.

    - `DEGREE`, `SCALE`: the places of D and of 1 / R.
    - `POWERS`, `SLOPE_POWERS`: the first of POWER_COUNT places, of F and of dF/dz in powers of z / R.
    - `VALUES`, `SLOPES`: the first place of the coefficients of F and of dF/dz in T_d(z / R).
    """

    DEGREE, SCALE, POWERS = 0, 1, 2
    SLOPE_POWERS = POWERS + POWER_COUNT
    VALUES = SLOPE_POWERS + POWER_COUNT
    SLOPES = VALUES + POINTS[-1]
    SIZE = SLOPES + POINTS[-1]


@dataclass(frozen=True)
class SeriesBatch:
    """The series of M modules.

    - `coefficients`: shape (M, P + POWER_COUNT), float64, with gradients: P coefficients, then the same polynomial's
      powers, see `with_powers`.
    - `degree`: D, the number of coefficients that the tolerance needs, shape (M,), int32.
    - `radius`: R, shape (M,).
    - `zero`: F(BA) is zero for certain, shape (M,), bool.
    - `resolved`: P coefficients are enough, and the nodes are close enough not to miss the narrowest basis function,
      shape (M,), bool.
    """

    coefficients: Tensor
    degree: Tensor
    radius: Tensor
    zero: Tensor
    resolved: Tensor


def compile_series(
    tables: Tables, parameters: tuple[Tensor, ...], extent: Extent, points: int, tolerance: float | Tensor
) -> SeriesBatch:
    """Interpolate every function at `points` nodes on [−R, R] and find the degrees.

    tolerance: one number, or shape (M,), relative to the largest value of F without its path on the part of the range
    that BA reaches. The degree keeps the sum of the omitted coefficients below the tolerance. This also holds for F' on
    the whole range, for a probe (the function with other amplitudes) and for its derivative: the gradients need every
    basis function resolved, even if α cancels it or is zero. If BA is zero, a centered F is zero whatever its
    parameters are, and they get no gradient.
    """
    coefficients, both, spacing, zero = _Interpolate.apply(  # type: ignore[no-untyped-call]
        tables, extent, points, *parameters
    )
    with torch.no_grad():
        degree, resolved = _degree(both, extent, tolerance)
        resolved &= (spacing <= COARSE) | ~extent.radius.isfinite()
    return SeriesBatch(coefficients, degree, extent.radius, zero, resolved)


def _of_every_module(tolerance: float | Tensor, like: Tensor) -> Tensor:
    """The tolerance of every module, in a shape that multiplies `like`, (M, ...)."""
    # Filled on the device: a copy from the host cannot be captured in a CUDA graph.
    every = tolerance if isinstance(tolerance, Tensor) else like.new_full((), tolerance)
    return every.reshape(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def verify(
    tables: Tables, parameters: tuple[Tensor, ...], radius: Tensor, points: int, tolerance: float | Tensor
) -> Tensor:
    """Whether the series equals F between the nodes and at grid points, where narrow functions peak: (M,), bool."""
    both = with_probe(tables(*(p.double() for p in parameters)))
    angle = torch.linspace(0, math.pi, 2 * points + 1, dtype=torch.float64, device=radius.device)
    # A sample of the peaks is enough, since no amplitude of the probe is zero. So the cost grows with N, not N².
    count = both.grid.shape[-1]
    peaks = both.grid[:, :: 1 + count // PEAKS] / (both.gain * radius).unsqueeze(1)
    places = torch.cat([torch.cos(angle).expand(len(radius), -1), peaks.clamp(-1, 1)], dim=1)
    truth = both(radius.unsqueeze(1) * places)
    degrees = torch.arange(points, dtype=torch.float64, device=radius.device)
    values = torch.cos(degrees * torch.arccos(places).unsqueeze(-1)) @ _interpolate(both, radius, points)
    error = (values - truth).abs().amax(1)
    size = truth.abs().amax(1)
    return ((error <= _of_every_module(tolerance, size) * size) | ~radius.isfinite().unsqueeze(1)).all(1)


@torch.no_grad()
def growth(tables: Tables, parameters: tuple[Tensor, ...], radius: Tensor, reached: Tensor) -> Tensor:
    """max |F| on [−R, R] over that on ±reached, shape (M,): the factor by which the relative error on BA grows."""
    transfer = tables(*(p.double() for p in parameters))
    nodes = _nodes(POINTS[1], radius.device)
    wide, narrow = (transfer(r.unsqueeze(1) * nodes).abs().amax(1) for r in (radius, reached))
    return wide / narrow.clamp_min(torch.finfo(torch.float64).tiny)


def with_probe(transfer: Transfer) -> Transfer:
    """Two functions side by side: F without its identity path, which is linear in α, and the probe.

    The path is left out, since the part that trains may be small in comparison.
    """
    index = torch.arange(transfer.alpha.shape[-1], dtype=torch.float64, device=transfer.alpha.device)
    probe = torch.cos(index**2).expand_as(transfer.alpha)
    both = transfer.with_parameters(torch.stack([transfer.alpha, probe], -1), *transfer.parameters[1:])
    return dataclasses.replace(both, path=False)


def reach(transfer: Transfer, radius: Tensor) -> Tensor:
    """ω g R with the largest ω: the largest |u| of the narrowest basis function."""
    return transfer.omega.detach().amax(-1) * transfer.gain.detach() * radius


def _interpolate(transfer: Transfer, radius: Tensor, points: int) -> Tensor:
    """The coefficients (M, P), or (M, P, k) of k functions side by side."""
    values = transfer(radius.unsqueeze(1) * _nodes(points, radius.device))
    return torch.einsum("dp,mp...->md...", _cosine_transform(points, radius.device), values)


def _degree(coefficients: Tensor, extent: Extent, tolerance: float | Tensor) -> tuple[Tensor, Tensor]:
    """The smallest D with a small remainder for F, F', the probe and its derivative; and whether there is one.

    The sum of the last quarter of the P coefficients estimates that of the coefficients beyond P.
    """
    points, radius = coefficients.shape[1], extent.radius
    slopes = torch.einsum("ed,mdk->mek", _differentiation(points, radius.device), coefficients)
    series = torch.cat([coefficients, slopes], dim=2)
    on_nodes = torch.einsum("dp,mdk->mpk", _polynomials(points, radius.device), series)
    size = on_nodes.abs().amax(1, keepdim=True)
    # For slopes the variation counts: the gradient to a grid point is F' minus its value at zero.
    count = coefficients.shape[2]
    variation = (on_nodes.amax(1, keepdim=True) - on_nodes.amin(1, keepdim=True))[..., count:]
    size[..., count:] = torch.maximum(variation, LEAST_VARIATION * size[..., count:])
    beyond = _nodes(points, radius.device).abs() > extent.share.unsqueeze(1)
    size[..., :count] = on_nodes[..., :count].abs().masked_fill(beyond.unsqueeze(2), 0.0).amax(1, keepdim=True)
    left_out = series.abs().flip(1).cumsum(1).flip(1)  # [D]: the sum of |c_d| for d ≥ D
    remainder = left_out + left_out[:, points * 3 // 4].unsqueeze(1)
    small = (remainder <= _of_every_module(tolerance, size) * size).all(2)
    degree = (~small).sum(1)
    # If A or B is not finite, no degree helps: the weights are NaN, which must show.
    resolved = small.any(1) | ~radius.isfinite()
    # One more, since dF/dω contains z F'.
    return (degree + 1).clamp(2, points).int(), resolved


class _Interpolate(torch.autograd.Function):
    """Four results of one evaluation at the nodes.

    - The coefficients of F, with powers, shape (M, P + POWER_COUNT).
    - Those of F without its path and of the probe, shape (M, P, 2).
    - The largest distance of neighboring nodes, in widths of the narrowest basis function, shape (M,).
    - Whether F(BA) is zero for certain, shape (M,).

    The backward pass evaluates F again, so it can run many times, and N values per node need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, tables: Tables, extent: Extent, points: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        # Copies, not saved tensors: gradient accumulation uses one series in several backward passes.
        ctx.inputs = tables, extent, points, [p.detach().double().clone() for p in parameters]
        ctx.dtypes = [p.dtype for p in parameters]
        transfer, radius = tables(*ctx.inputs[3]), extent.radius
        both = _interpolate(with_probe(transfer), radius, points)
        coefficients = both[..., 0].clone()
        if transfer.path:
            coefficients[:, 1] += transfer.scaling * radius  # s p z, and z = R T_1(z / R)
        spacing = reach(transfer, radius) * (math.pi / points) / width(type(transfer.basis))
        ctx.zero = extent.zero & transfer.centre
        ctx.mark_non_differentiable(both, spacing, ctx.zero)
        return coefficients @ with_powers(points, radius.device), both, spacing, ctx.zero

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tables, extent, points, values = ctx.inputs
        # If BA is zero, only F(0) is needed, and the truncation error on a range would be all of the gradient.
        radius = extent.radius.masked_fill(extent.zero, 0.0)
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_(need) for v, need in zip(values, ctx.needs_input_grad[3:], strict=True)]
            coefficients = _interpolate(tables(*leaves), radius, points)
            # The gradient of a zero F would be rounding alone, from which Adam would make a full step.
            moments = (upstream[0] @ with_powers(points, radius.device).T).masked_fill(ctx.zero.unsqueeze(1), 0.0)
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(coefficients, trained, moments, allow_unused=True))
        grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return None, None, None, *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True))


def _constant(make: Callable[[int], Tensor]) -> Callable[[int, torch.device], Tensor]:
    """Cache a float64 constant by size and device; made outside inference mode, whose tensors training cannot use."""

    @functools.cache
    def made(points: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            return make(points).to(device)

    return made


@_constant
def _nodes(points: int) -> Tensor:
    """The Chebyshev nodes on [−1, 1], shape (P,)."""
    return torch.cos(math.pi * (torch.arange(points, dtype=torch.float64) + 0.5) / points)


@_constant
def _polynomials(points: int) -> Tensor:
    """T_d at the nodes, shape (P, P)."""
    angle = math.pi * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return torch.cos(torch.arange(points, dtype=torch.float64).unsqueeze(1) * angle)


@_constant
def _cosine_transform(points: int) -> Tensor:
    """The matrix (P, P) from values at the nodes to coefficients."""
    transform = _polynomials(points, torch.device("cpu")) * (2 / points)
    transform[0] /= 2
    return transform


@_constant
def _differentiation(points: int) -> Tensor:
    """The matrix (P, P) from the coefficients of Σ c_d T_d(t) to those of its derivative in t."""
    row, column = torch.meshgrid(torch.arange(points), torch.arange(points), indexing="ij")
    matrix = (2.0 * column * ((column > row) & ((column - row) % 2 == 1))).double()
    matrix[0] /= 2
    return matrix


@_constant
def _monomials(points: int) -> Tensor:
    """The matrix (P, P) from coefficients of T_d(t) to those of t^d."""
    matrix = torch.zeros(points, points, dtype=torch.float64)
    matrix[0, 0] = matrix[1, 1] = 1
    for d in range(2, points):
        matrix[1:, d] = 2 * matrix[:-1, d - 1]
        matrix[:, d] -= matrix[:, d - 2]
    return matrix


@torch.no_grad()
def pack(batch: SeriesBatch) -> Tensor:
    """All series in the layout of `Packed`, (M, SIZE), float64, zero beyond the degree; powers of short ones only."""
    points = batch.coefficients.shape[1] - POWER_COUNT
    beyond = torch.arange(points, device=batch.radius.device) >= batch.degree.unsqueeze(1)
    coefficients = batch.coefficients[:, :points]
    values = coefficients.masked_fill(beyond | batch.zero.unsqueeze(1), 0.0)
    # From all coefficients: the terms omitted from F are steep at the ends of the range.
    slopes = coefficients @ _differentiation(points, batch.radius.device).T / batch.radius.unsqueeze(1)
    slopes = slopes.masked_fill(beyond, 0.0)
    to_powers = _monomials(POWER_COUNT, batch.radius.device).T
    packed = values.new_zeros(len(values), Packed.SIZE)
    packed[:, Packed.DEGREE], packed[:, Packed.SCALE] = batch.degree, 1 / batch.radius
    for start, numbers in (
        (Packed.POWERS, values[:, :POWER_COUNT] @ to_powers),
        (Packed.SLOPE_POWERS, slopes[:, :POWER_COUNT] @ to_powers),
        (Packed.VALUES, values),
        (Packed.SLOPES, slopes),
    ):
        packed[:, start : start + numbers.shape[1]] = numbers
    return packed


@_constant
def with_powers(points: int) -> Tensor:
    """The matrix (P, P + POWER_COUNT) that appends to a row of coefficients the same polynomial's powers of t.

    Its transpose maps the moments Σ G T_d(t), followed by Σ G t^k, to the sum of both as moments Σ G T_d(t).
    """
    powers = torch.zeros(points, POWER_COUNT, dtype=torch.float64)
    powers[:POWER_COUNT] = _monomials(POWER_COUNT, torch.device("cpu")).T
    return torch.cat([torch.eye(points, dtype=torch.float64), powers], dim=1)
