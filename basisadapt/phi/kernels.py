"""W + F(BA) and its pullback: on any device in pieces that fit into a cache, on a GPU by fused kernels.

`kernels_triton` has the kernels for series, `cells_triton` those for tables. Nothing larger than one weight matrix is
held.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from basisadapt.core.errors import InputError
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Evaluator, Series, Split

PIECE = {"cpu": 1 << 20}  # numbers held per piece: about a core's cache
PIECE_ELSEWHERE = 1 << 26  # large enough that a GPU is busy


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, device: torch.device) -> str:
    """What "auto" means on `device`. Raises InputError if "triton" is asked for where it cannot run."""
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if backend == "triton" and not (device.type == "cuda" and has_triton()):
        missing = "the triton package" if device.type == "cuda" else f"a CUDA device, and the weights are on {device}"
        raise InputError(f'backend "triton" needs {missing}; "auto" takes what there is')
    return backend


def _fused(evaluator: Evaluator, A: Tensor, backend: str) -> ModuleType | None:
    """The module of fused kernels for this evaluator, or None."""
    if backend != "triton" or A.dtype != torch.float32 or not isinstance(evaluator, Series | Row):
        return None
    if isinstance(evaluator, Row):
        from basisadapt.phi import cells_triton

        return cells_triton
    from basisadapt.phi import kernels_triton

    return kernels_triton


def effective_weight(
    weight: Tensor | None, A: Tensor, B: Tensor, evaluator: Evaluator | Split, dtype: torch.dtype, backend: str
) -> Tensor:
    """W + F(BA), or F(BA) where `weight` is None, formed in the dtype of A and B and rounded once to `dtype`."""
    if isinstance(evaluator, Split):
        few = evaluator.rows
        effective = effective_weight(weight, A, B.index_fill(0, few, 0.0), evaluator.main, dtype, backend)
        of_few = None if weight is None else weight[few]
        effective[few] = effective_weight(of_few, A, B[few], evaluator.apart, dtype, backend)
        return effective
    if fused := _fused(evaluator, A, backend):
        formed: Tensor = fused.effective_weight(weight, A, B, evaluator, dtype)
        return formed
    effective = A.new_empty(len(B), A.shape[1], dtype=dtype)
    for rows, z, room in _pieces(A, B, evaluator):
        _place(effective, rows, weight, evaluator.value(z, room))
    return effective


def pull_back(
    dense: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, evaluator: Evaluator | Split, backend: str,
    form: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """W + F(BA) in the dtype of `dense`, if `form`, and the gradients to A, B and F's parameters.

    dense: G = dL/d(W + F(BA)), (out_features, in_features); overwritten where that saves memory.
    """
    if isinstance(evaluator, Split):
        return _pull_back_apart(dense, weight, A, B, evaluator, backend, form)
    if fused := _fused(evaluator, A, backend):
        # One kernel for both would need too many registers.
        made = fused.effective_weight(weight, A, B, evaluator, dense.dtype) if form else None
        return made, *fused.pull_back(dense, A, B, evaluator)
    effective = torch.empty_like(dense) if form else None
    grad_a, grad_b = torch.zeros_like(A), torch.empty_like(B)
    totals: list[Tensor] = []
    for rows, z, room in _pieces(A, B, evaluator):
        value, piece, sums = evaluator.pullback(z, dense[rows].to(A.dtype), room)
        if effective is not None:
            _place(effective, rows, weight, value)
        grad_a.addmm_(B[rows].T, piece)
        grad_b[rows] = piece @ A.T
        totals = [total + new for total, new in zip(totals, sums, strict=True)] if totals else list(sums)
    return effective, grad_a, grad_b, evaluator.gradients(tuple(totals))


def _pull_back_apart(
    dense: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, evaluator: Split, backend: str, form: bool
) -> tuple[Tensor | None, Tensor, Tensor, tuple[Tensor, ...]]:
    """`pull_back` for a `Split`: first its rows apart, then all others."""
    rows = evaluator.rows
    of_rows = None if weight is None else weight[rows]
    apart, apart_a, apart_b, of_apart = pull_back(dense[rows], of_rows, A, B[rows], evaluator.apart, backend, form)
    others, least = dense.index_fill(0, rows, 0.0), B.index_fill(0, rows, 0.0)
    effective, grad_a, grad_b, of_main = pull_back(others, weight, A, least, evaluator.main, backend, form)
    grad_b[rows] = apart_b
    if effective is not None and apart is not None:
        effective[rows] = apart
    return effective, grad_a + apart_a, grad_b, of_main + of_apart


def _pieces(A: Tensor, B: Tensor, evaluator: Evaluator) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row ranges of BA, BA there, and the evaluator's scratch memory, which all pieces share."""
    size = PIECE.get(A.device.type, PIECE_ELSEWHERE)
    step = min(len(B), max(1, size // (evaluator.width * A.shape[1])))
    room = evaluator.scratch(step * A.shape[1], A)
    for start in range(0, len(B), step):
        rows = slice(start, start + step)
        yield rows, B[rows] @ A, room


def _place(effective: Tensor, rows: slice, weight: Tensor | None, delta: Tensor) -> None:
    if weight is None:
        effective[rows] = delta
    else:
        torch.add(weight[rows], delta, out=effective[rows])
