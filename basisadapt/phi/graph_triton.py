"""The fused kernels as operators that torch.compile looks into: inductor launches them as it launches its own.

To the host, an opaque operator costs ten times as much. Without a graph, `kernels_triton.launch` takes less time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from basisadapt.phi import cells_triton, kernels_triton
from basisadapt.phi.kernels_triton import SUMS, product_in_float32


def _powers(dtype: torch.dtype) -> int:
    """As `kernels_triton._count`, for every degree that a graph may meet."""
    return 0 if dtype == torch.float32 else kernels_triton.POWER_COUNT.value


def _weight(weight: Tensor | None, A: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The pointer and the strides of W; where there is none, of a tensor that is not read."""
    return (A, A.stride()) if weight is None else (weight, weight.stride())


@torch.library.triton_op("basisadapt::form_series", mutates_args={})
def form_series(
    weight: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, packed: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """W + F(BA) in the dtype of `like`; packed: see `evaluators.Series`."""
    (r, n), m = A.shape, B.shape[0]
    out = like.new_empty(m, n)
    grid, constants = kernels_triton._form_plan(m, n, r, like.dtype, A.device)
    W, strides = _weight(weight, A)
    torch.library.wrap_triton(kernels_triton._form)[grid](
        W, out, A, B, packed, like, m, n, r, *strides, _powers(like.dtype), weight is not None, *constants
    )
    return out


@torch.library.triton_op("basisadapt::pull_series", mutates_args={"dense"})
def pull_series(
    dense: torch.Tensor, A: torch.Tensor, B: torch.Tensor, packed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments, and the gradient to B, empty if r needs more than one block; G = dense becomes G F'(BA)."""
    (r, n), m = A.shape, B.shape[0]
    tiles, each, programs, constants = kernels_triton._pull_plan(m, n, r, dense.dtype, A.device)
    count, size = _powers(dense.dtype), m * r if constants[3] else 0
    parts = (tiles - 2) // each + 2
    scratch = A.new_empty(SUMS * programs + parts * size)
    moments, grad_b = A.new_empty(SUMS, dtype=torch.float64), A.new_empty((m, r) if size else (0,))
    torch.library.wrap_triton(kernels_triton._pull)[(programs, 1, 1)](
        dense, A, B, packed, scratch, m, n, r, tiles, each, programs, count, *constants
    )
    block = kernels_triton.COLLECT.columns
    torch.library.wrap_triton(kernels_triton._collect)[(SUMS + -(-size // block), 1, 1)](
        packed, scratch, moments, grad_b, size, tiles, each, programs, parts, count, kernels_triton.PULL.rows * r, block
    )
    return moments, grad_b


@torch.library.triton_op("basisadapt::form_table", mutates_args={})
def form_table(
    weight: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, pairs: torch.Tensor, packed: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """W + F(BA) in the dtype of `like`; pairs, packed: see `cubics.Row`."""
    (r, n), m = A.shape, B.shape[0]
    out = like.new_empty(m, n)
    grid, constants = cells_triton._plan(m, n, r, A.device, cells_triton.FORM)
    W, strides = _weight(weight, A)
    torch.library.wrap_triton(cells_triton._form)[grid](
        W, out, A, B, pairs, packed, like, m, n, r, *strides, weight is not None, *constants
    )
    return out


@torch.library.triton_op("basisadapt::pull_table", mutates_args={"dense"})
def pull_table(
    dense: torch.Tensor, largest: torch.Tensor, A: torch.Tensor, B: torch.Tensor, pairs: torch.Tensor,
    packed: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The gradient to the cubics; G = dense becomes G F'(BA). largest: of |G|."""
    # The place of a sum depends on them, which torch takes for writing to them.
    A, B, pairs = A.clone(), B.clone(), pairs.clone()
    (r, n), m = A.shape, B.shape[0]
    cells = pairs.shape[0]
    grid, constants = cells_triton._plan(m, n, r, A.device, cells_triton.PULL)
    size, copies = 4 * cells, cells_triton._copies(cells)
    sums = torch.zeros(copies * size, dtype=torch.int64, device=A.device)
    of_cubics = A.new_empty(cells, 4)
    torch.library.wrap_triton(cells_triton._pull)[grid](
        dense, A, B, pairs, packed, largest, sums, m, n, r, size, copies, *constants
    )
    block = cells_triton.COLLECT.columns
    torch.library.wrap_triton(cells_triton._collect)[(-(-size // block), 1, 1)](
        sums, largest, of_cubics, size, copies, block
    )
    return of_cubics


def effective_weight(weight: Tensor | None, A: Tensor, B: Tensor, row: Tensor, packed: Tensor, like: Tensor) -> Tensor:
    """W + F(BA) in the dtype of `like`, formed after it; row, packed: see `operators.Link`."""
    if row.dim() == 1:
        formed: Tensor = torch.ops.basisadapt.form_series(weight, A, B, packed, like)
    else:
        formed = torch.ops.basisadapt.form_table(weight, A, B, row.view(torch.int64), packed, like)
    return formed


def pull_back(dense: Tensor, A: Tensor, B: Tensor, row: Tensor, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to A, B and the row; `dense` is overwritten."""
    if row.dim() == 1:
        of_row, grad_b = torch.ops.basisadapt.pull_series(dense, A, B, packed)
    else:
        largest = torch.linalg.vector_norm(dense, torch.inf)
        of_row, grad_b = torch.ops.basisadapt.pull_table(dense, largest, A, B, row.view(torch.int64), packed), None
    grad_a = product_in_float32(B.T, dense)
    return grad_a, grad_b if grad_b is not None and grad_b.numel() else product_in_float32(dense, A.T), of_row
