"""y = x (W + F(BA))ᵀ + b and its gradients: the one autograd function.

W + F(BA) exists only while a layer is at work: the forward pass saves x, A and B, the backward pass builds it again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from basisadapt.phi import kernels
from basisadapt.phi.choice import compute_dtype
from basisadapt.phi.dense_gradient import EXACT, DenseGradient, dense_gradient
from basisadapt.phi.evaluators import Evaluator, Split

Weight = Tensor | Callable[[], Tensor] | None  # W; or how to make it, for a quantised one; or none, for F(BA) alone


@torch.no_grad()
def delta_weight(A: Tensor, B: Tensor, evaluator: Evaluator | Split, backend: str) -> Tensor:
    """F(BA), shape (out_features, in_features), in `compute_dtype`."""
    dtype = compute_dtype(A)
    with _no_autocast(A):
        return kernels.effective_weight(None, A.to(dtype), B.to(dtype), evaluator, dtype, backend)


@dataclass(frozen=True)
class Execution:
    """How the work is done, not what: see `kernels.resolve_backend` and `dense_gradient`."""

    backend: str
    dense_gradient: DenseGradient = EXACT


def adapted_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, A: Tensor, B: Tensor, evaluator: Evaluator | Split,
    execution: Execution,
) -> Tensor:  # fmt: skip
    """x (W + F(BA))ᵀ + b, or x F(BA)ᵀ + b where `weight` is None, differentiable in everything but a made weight.

    x: (..., in_features); weight: (out_features, in_features), any floating dtype and strides; A: (r, in_features);
    B: (out_features, r). Under autocast the product runs in autocast's dtype. F(BA) is added in at least float32 and
    rounded once to the dtype of the product.
    """
    made, tensor = (weight, None) if callable(weight) else (None, weight)
    result: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        x, tensor, bias, A, B, made, evaluator, execution, *evaluator.parameters
    )
    return result


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast would run the small products behind F(BA) in half precision."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; asking first is cheaper than converting to what it is."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _tokens(x: Tensor) -> Tensor:
    """x as a matrix: a row for each token."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        made: Callable[[], Tensor] | None,
        evaluator: Evaluator | Split,
        execution: Execution,
        *parameters: Tensor,
    ) -> Tensor:
        # A frozen weight is kept outside: checkpointing would pack and unpack it, layer after layer, for nothing.
        ctx.frozen = None if weight is None or weight.requires_grad else weight
        ctx.save_for_backward(x, A, B, None if ctx.frozen is not None else weight)
        ctx.made, ctx.evaluator, ctx.execution, ctx.has_bias = made, evaluator, execution, bias is not None
        weight = made() if made else weight
        autocast = torch.is_autocast_enabled(x.device.type)
        ctx.dtype = torch.get_autocast_dtype(x.device.type) if autocast else (x if weight is None else weight).dtype
        dtype = compute_dtype(A)
        with _no_autocast(x):
            effective = kernels.effective_weight(
                weight, _as(A, dtype), _as(B, dtype), evaluator, ctx.dtype, execution.backend
            )
            return F.linear(_as(x, ctx.dtype), effective, None if bias is None else _as(bias, ctx.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast(upstream[0]):
            return _AdaptedLinear._gradients(ctx, upstream[0])

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight = ctx.saved_tensors
        dtype = compute_dtype(A)
        gradient = _tokens(_as(upstream, ctx.dtype))
        dense = dense_gradient(gradient, _tokens(_as(x, ctx.dtype)), ctx.execution.dense_gradient)
        grad_weight = dense.to(weight.dtype, copy=True) if ctx.needs_input_grad[1] else None
        form = ctx.needs_input_grad[0]
        base = ctx.made() if ctx.made and form else weight if ctx.frozen is None else ctx.frozen
        effective, grad_a, grad_b, grads = kernels.pull_back(
            dense, base, _as(A, dtype), _as(B, dtype), ctx.evaluator, ctx.execution.backend, form
        )
        grad_x = None if effective is None else _as((gradient @ effective).view(x.shape), x.dtype)
        grad_bias = gradient.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        rest = [_as(g, p.dtype) for g, p in zip(grads, ctx.evaluator.parameters, strict=True)]
        return grad_x, grad_weight, grad_bias, _as(grad_a, A.dtype), _as(grad_b, B.dtype), None, None, None, *rest
