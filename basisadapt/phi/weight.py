"""y = x (W + ΔW)ᵀ + b with ΔW = s (p·BA + f(BA)), and its gradients: the one autograd function.

W + ΔW exists only while a layer is at work: the forward pass saves x, A and B, the backward pass builds it again. ΔW
is formed in pieces of a few rows, so that nothing larger than one weight matrix is ever held.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer

PIECE = 1 << 19  # numbers held per piece: about what a core's cache holds


class Evaluator(ABC):
    """f on a matrix, and its pullback. `parameters` are the tensors that gradients flow to."""

    parameters: tuple[Tensor, ...]
    width: int  # numbers held per element

    @abstractmethod
    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room to work in for matrices of up to `count` elements, to be passed to the methods below."""

    @abstractmethod
    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """f(z), shape of z."""

    @abstractmethod
    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f(z), gradient · f'(z), and the gradients of Σ gradient · f(z) to the parameters."""


class Series(Evaluator):
    """f as a compiled Chebyshev series (see `series`)."""

    def __init__(self, coefficients: Tensor, radius: float, dtype: torch.dtype) -> None:
        self.parameters = (coefficients,)
        self.width = len(coefficients)
        self._scale = 1 / radius
        self._signs = series.signs(self.width, coefficients.device)
        values = torch.stack([coefficients.detach(), series.derivative(coefficients) / radius])
        self._rows = (self._signs * values).to(dtype)  # of f and of f', against `series.basis`

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room for D polynomials."""
        return series.scratch(self.width, count, like)

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """f(z)."""
        return (self._rows[0] @ series.basis(z.flatten(), self._scale, room)).view_as(z)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f(z), gradient · f'(z), and the moments of the gradient."""
        basis = series.basis(z.flatten(), self._scale, room)
        value, slope = (self._rows @ basis).view(2, *z.shape)
        moments = basis @ gradient.flatten()
        return value, slope.mul_(gradient), (self._signs * moments.double(),)


class Direct(Evaluator):
    """f from its N basis functions: the reference that every faster evaluator is tested against."""

    def __init__(self, transfer: Transfer, dtype: torch.dtype) -> None:
        self.parameters = transfer.parameters
        self.width = 4 * len(transfer.alpha)
        self._transfer = transfer.with_parameters(*(p.detach().to(dtype) for p in transfer.parameters))

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """None: autograd takes its own."""
        return like.new_empty(0)

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """f(z)."""
        return self._transfer(z)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f(z), gradient · f'(z), and the gradients to α, ω and the grid, by autograd over this piece alone."""
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (z, *self._transfer.parameters)]
            value = self._transfer.with_parameters(*inputs[1:])(inputs[0])
            slope, *rest = torch.autograd.grad(value, inputs, gradient, allow_unused=True)
        grads = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(rest, inputs[1:], strict=True))
        return value.detach(), torch.zeros_like(z) if slope is None else slope, grads


def evaluator(transfer: Transfer, A: Tensor, B: Tensor, backend: str, tolerance: float = 1e-6) -> Evaluator:
    """The evaluator for z = BA: a series where one is accurate to `tolerance`, else direct; "direct" is always direct.

    In float64 the tolerance is 1e-13, whatever is asked.
    """
    dtype = compute_dtype(A)
    if backend == "auto":
        with torch.no_grad(), _no_autocast(A):
            low, high = torch.aminmax(B.to(dtype) @ A.to(dtype))
        # The floor keeps rounding out of f' where BA is zero, as at the start: Adam would scale it up.
        radius = max(-float(low), float(high), 1e-2 / transfer.gain)
        if math.isfinite(radius):
            coefficients = series.coefficients(transfer, radius, 1e-13 if dtype == torch.float64 else tolerance)
            if coefficients is not None:
                return Series(coefficients, radius, dtype)
    return Direct(transfer, dtype)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What φ is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Update:
    """ΔW = scaling · (path · BA + f(BA)), in the arithmetic of `compute_dtype`; f is the evaluator's."""

    evaluator: Evaluator
    path: bool
    scaling: float

    def pieces(self, A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Row ranges of BA, BA there, and the evaluator's room, which all pieces share."""
        step = min(len(B), max(1, PIECE // (self.evaluator.width * A.shape[1])))
        room = self.evaluator.scratch(step * A.shape[1], A)
        for start in range(0, len(B), step):
            rows = slice(start, start + step)
            yield rows, B[rows] @ A, room

    def combine(self, z: Tensor, value: Tensor) -> Tensor:
        """ΔW from BA and f(BA), written over f(BA)."""
        if self.path:
            value += z
        return value if self.scaling == 1 else value.mul_(self.scaling)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would run the small products behind ΔW in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.no_grad()
def delta_weight(A: Tensor, B: Tensor, update: Update) -> Tensor:
    """ΔW, shape (out_features, in_features), in `compute_dtype`."""
    return _effective_weight(None, A, B, update, compute_dtype(A))


def _effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, update: Update, dtype: torch.dtype) -> Tensor:
    """W + ΔW, or ΔW where `weight` is None, rounded once to `dtype`."""
    A, B = A.to(compute_dtype(A)), B.to(compute_dtype(A))
    effective = A.new_empty(len(B), A.shape[1], dtype=dtype)
    with _no_autocast(A):
        for rows, z, room in update.pieces(A, B):
            _place(effective, rows, weight, update.combine(z, update.evaluator.value(z, room)))
    return effective


def _place(effective: Tensor, rows: slice, weight: Tensor | None, delta: Tensor) -> None:
    if weight is None:
        effective[rows] = delta
    else:
        torch.add(weight[rows], delta, out=effective[rows])


def adapted_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, update: Update
) -> Tensor:
    """x (W + ΔW)ᵀ + b, or x ΔWᵀ + b where `weight` is None, differentiable in everything.

    x: (..., in_features); weight: (out_features, in_features), any floating dtype and strides; A: (r, in_features);
    B: (out_features, r). Under autocast the product runs in autocast's dtype. ΔW is added in at least float32 and
    rounded once to the dtype of the product.
    """
    result: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, A, B, update, *update.evaluator.parameters
    )
    return result


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        update: Update,
        *parameters: Tensor,
    ) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        ctx.dtype = torch.get_autocast_dtype(x.device.type) if autocast else (x if weight is None else weight).dtype
        ctx.update = update
        ctx.save_for_backward(x, weight, A, B)
        ctx.has_bias = bias is not None
        effective = _effective_weight(weight, A, B, update, ctx.dtype)
        with _no_autocast(x):
            return F.linear(x.to(ctx.dtype), effective, None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast(upstream[0]):
            return _AdaptedLinear._gradients(ctx, upstream[0])

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        update: Update = ctx.update
        dtype = compute_dtype(A)
        gradient = upstream.to(ctx.dtype).flatten(0, -2)
        dense = (gradient.T @ x.to(ctx.dtype).flatten(0, -2)).to(dtype)  # the one product no φ can avoid

        factor_a, factor_b = A.to(dtype), B.to(dtype)
        effective = torch.empty_like(dense, dtype=ctx.dtype)
        grad_a, grad_b = torch.zeros_like(factor_a), torch.empty_like(factor_b)
        grads = [torch.zeros_like(p, dtype=torch.float64) for p in update.evaluator.parameters]
        for rows, z, room in update.pieces(factor_a, factor_b):
            value, slope, parameter_grads = update.evaluator.pullback(z, dense[rows], room)
            _place(effective, rows, weight, update.combine(z, value))
            piece = update.combine(dense[rows], slope)
            grad_a.addmm_(factor_b[rows].T, piece)
            grad_b[rows] = piece @ factor_a.T
            for total, grad in zip(grads, parameter_grads, strict=True):
                total += grad

        grad_x = (gradient @ effective).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = dense.to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = gradient.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        scaled = [(update.scaling * g).to(p.dtype) for g, p in zip(grads, update.evaluator.parameters, strict=True)]
        return grad_x, grad_weight, grad_bias, grad_a.to(A.dtype), grad_b.to(B.dtype), None, *scaled
