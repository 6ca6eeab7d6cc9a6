"""G = (∂L/∂y)ᵀ x, the gradient with respect to the whole weight: the one product that no elementwise φ avoids.

Exact, it costs what the layer's own product costs. The cheaper ways are estimates, for where the products set the
pace: in 8-bit floating point, or from groups of tokens added up under random signs (a sketch, which is unbiased).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from basisadapt.core.errors import refused

LARGEST_FP8 = 448.0  # of float8_e4m3fn
FP8_MULTIPLE = 16  # sides of an 8-bit product


@dataclass(frozen=True)
class DenseGradient:
    """How G is found: "exact", "fp8" (in 8 bits), or from a "sketch", sums of so many tokens."""

    kind: str = "exact"
    tokens: int = 1

    @staticmethod
    def parse(value: str) -> DenseGradient:
        """ "exact", "fp8" or "sketch:K" with a whole number K from 2 to 999. Raises InputError."""
        if value in ("exact", "fp8"):
            return DenseGradient(value)
        found = re.fullmatch(r"sketch:(\d{1,3})", value)
        if found is None or int(found[1]) < 2:
            raise refused("dense_gradient", value, '"exact", "fp8" or "sketch:K" with K from 2 to 999')
        return DenseGradient("sketch", int(found[1]))


EXACT = DenseGradient()


def dense_gradient(upstream: Tensor, x: Tensor, how: DenseGradient) -> Tensor:
    """upstreamᵀ x, shape (out_features, in_features), in x's dtype; upstream: (T, out_features), x: (T, in_features).

    "fp8" needs half precision and sides that are multiples of 16, and is exact otherwise. A sketch draws one sign a
    token from torch's generator of the device and adds up K tokens: a product of T / K tokens.
    """
    if how.kind == "fp8" and x.element_size() == 2 and not any(s % FP8_MULTIPLE for s in (*x.shape, upstream.shape[1])):
        return _fp8(upstream, x)
    if how.kind == "sketch":
        upstream, x = _sketch(upstream, x, how.tokens)
    return torch.mm(upstream.t(), x)


def _fp8(upstream: Tensor, x: Tensor) -> Tensor:
    left, left_scale = _quantise(upstream)
    right, right_scale = _quantise(x)
    per_tensor = F.ScalingType.TensorWise
    product: Tensor = F.scaled_mm(
        left, right.T, left_scale, per_tensor, right_scale, per_tensor, output_dtype=x.dtype, use_fast_accum=False
    )
    return product


def _quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose in float8_e4m3fn, contiguous, and its scale."""
    scale = (matrix.abs().amax().float() / LARGEST_FP8).clamp_min(torch.finfo(torch.float32).tiny)
    small = torch.empty(matrix.shape[::-1], dtype=torch.float8_e4m3fn, device=matrix.device)
    return small.copy_((matrix / scale.to(matrix.dtype)).T), scale


def _sketch(upstream: Tensor, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums of `size` tokens each, under one draw of signs."""
    short = -len(x) % size
    signs = torch.randint(0, 2, (len(x) + short,), device=x.device).mul_(2).sub_(1).to(x.dtype).view(-1, 1, size)
    upstream, x = F.pad(upstream, (0, 0, 0, short)), F.pad(x, (0, 0, 0, short))
    return (signs @ upstream.view(-1, size, upstream.shape[1])).squeeze(1), (
        signs @ x.view(-1, size, x.shape[1])
    ).squeeze(1)
