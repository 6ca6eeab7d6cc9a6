"""G = (∂L/∂y)ᵀ x, the gradient with respect to the whole weight: the one product that an elementwise φ cannot avoid.

The exact product costs as much as the layer's own. There are two cheaper estimates: in 8-bit floating point, and from
sums of groups of tokens under random signs (a sketch, which is unbiased).
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
    """How G is computed.

    - `kind` (str, default "exact"): "exact", "fp8" (8-bit operands) or "sketch".
    - `tokens` (int, default 1): tokens per sum of a sketch.
    """

    kind: str = "exact"
    tokens: int = 1

    @staticmethod
    def parse(value: str) -> DenseGradient:
        """Parse "exact", "fp8" or "sketch:K" with K from 2 to 999. Raises InputError for anything else."""
        if value in ("exact", "fp8"):
            return DenseGradient(value)
        found = re.fullmatch(r"sketch:(\d{1,3})", value)
        if found is None or int(found[1]) < 2:
            raise refused("dense_gradient", value, '"exact", "fp8" or "sketch:K" with K from 2 to 999')
        return DenseGradient("sketch", int(found[1]))


EXACT = DenseGradient()


def dense_gradient(upstream: Tensor, x: Tensor, how: DenseGradient) -> Tensor:
    """upstreamᵀ x, shape (out_features, in_features), in x's dtype; upstream: (T, out_features), x: (T, in_features).

    "fp8" needs half precision and sides that are multiples of 16; without them the product is exact. A sketch draws a
    sign per token from torch's generator of the device, and multiplies sums of K tokens: a product of T / K rows.
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
    """Sums of `size` tokens each, with the same random signs for both."""
    short = -len(x) % size
    signs = torch.randint(0, 2, (len(x) + short,), device=x.device).mul_(2).sub_(1).to(x.dtype).view(-1, 1, size)
    upstream, x = F.pad(upstream, (0, 0, 0, short)), F.pad(x, (0, 0, 0, short))
    return (signs @ upstream.view(-1, size, upstream.shape[1])).squeeze(1), (
        signs @ x.view(-1, size, x.shape[1])
    ).squeeze(1)
