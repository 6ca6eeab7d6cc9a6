"""y = x (W + F(BA))ᵀ + b and its gradients: the one autograd function.

W + F(BA) exists only inside a pass of its layer: the forward pass saves x, A and B, the backward pass forms it again.
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

Weight = Tensor | Callable[[], Tensor] | None  # W, a function that dequantizes it, or None for F(BA) alone


@torch.no_grad()
def delta_weight(A: Tensor, B: Tensor, evaluator: Evaluator | Split, backend: str) -> Tensor:
    """F(BA), shape (out_features, in_features), in `compute_dtype`."""
    dtype = compute_dtype(A)
    with _no_autocast(A):
        return kernels.effective_weight(None, A.to(dtype), B.to(dtype), evaluator, dtype, backend)


@dataclass(frozen=True)
class Execution:
    """How F(BA) is evaluated, see `kernels.resolve_backend`, and how its dense gradient is computed."""

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
        x, tensor, bias, A, B, (made, evaluator, execution), *evaluator.parameters
    )
    return result


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, which would run the products behind F(BA) in half precision."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; asking first is cheaper than converting to what it is."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _tokens(x: Tensor) -> Tensor:
    """x as a matrix with a row per token."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def product_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of a layer's product: autocast's, otherwise W's, or without W that of x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return (x if weight is None else weight).dtype


def product(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, evaluator: Evaluator | Split,
    execution: Execution,
) -> Tensor:  # fmt: skip
    """x (W + F(BA))ᵀ + b, all of it in the dtype of x."""
    dtype = compute_dtype(A)
    with _no_autocast(x):
        effective = kernels.effective_weight(
            weight, _as(A, dtype), _as(B, dtype), evaluator, x.dtype, execution.backend
        )
        return F.linear(x, effective, None if bias is None else _as(bias, x.dtype))


@dataclass(frozen=True)
class Gradients:
    """The gradients of `product`, each in the dtype of its tensor; None for one that is not needed."""

    x: Tensor | None
    weight: Tensor | None
    A: Tensor
    B: Tensor
    parameters: tuple[Tensor, ...]


def pull_back(
    upstream: Tensor, x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, evaluator: Evaluator | Split,
    execution: Execution, form: bool, trains: bool,
) -> Gradients:  # fmt: skip
    """The gradients of `product`; to x if `form`, and to a weight that `trains`. upstream: in the dtype of x."""
    dtype = compute_dtype(A)
    with _no_autocast(x):
        gradient = _tokens(upstream)
        dense = dense_gradient(gradient, _tokens(x), execution.dense_gradient)
        grad_weight = dense.to(weight.dtype, copy=True) if trains and weight is not None else None
        effective, grad_a, grad_b, grads = kernels.pull_back(
            dense, weight, _as(A, dtype), _as(B, dtype), evaluator, execution.backend, form
        )
        grad_x = None if effective is None else torch.mm(gradient, effective).view(x.shape)
    return Gradients(grad_x, grad_weight, _as(grad_a, A.dtype), _as(grad_b, B.dtype), grads)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        how: tuple[Callable[[], Tensor] | None, Evaluator | Split, Execution],
        *parameters: Tensor,
    ) -> Tensor:
        # A frozen weight is kept outside: checkpointing would pack and unpack it, layer after layer, for nothing.
        ctx.frozen = None if weight is None or weight.requires_grad else weight
        ctx.save_for_backward(x, A, B, None if ctx.frozen is not None else weight)
        ctx.how, ctx.has_bias = how, bias is not None
        made, evaluator, execution = how
        weight = made() if made else weight
        ctx.dtype = product_dtype(x, weight)
        return product(_as(x, ctx.dtype), weight, bias, A, B, evaluator, execution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight = ctx.saved_tensors
        made, evaluator, execution = ctx.how
        form, trains, of_bias, *_ = ctx.needs_input_grad
        base = made() if made and form else weight if ctx.frozen is None else ctx.frozen
        gradient = _as(upstream[0], ctx.dtype)
        found = pull_back(gradient, _as(x, ctx.dtype), base, A, B, evaluator, execution, form, trains)
        grad_x = None if found.x is None else _as(found.x, x.dtype)
        grad_bias = _tokens(gradient).sum(0) if ctx.has_bias and of_bias else None
        rest = [_as(g, p.dtype) for g, p in zip(found.parameters, evaluator.parameters, strict=True)]
        return grad_x, found.weight, grad_bias, found.A, found.B, None, *rest
