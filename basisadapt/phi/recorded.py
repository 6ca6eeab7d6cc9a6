"""A compilation of φ as two CUDA graphs, one forward and one back, for steps in which nothing has to be chosen.

For the host, a compilation is some hundreds of launches; a graph is one. It writes to the same places in every step, so
that it serves one pass at a time: until the backward pass of that one has been, others are compiled without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from basisadapt.core.errors import InputError
from basisadapt.phi.cubics import Row
from basisadapt.phi.evaluators import Evaluator, Series, Split


class Graphs:
    """Work recorded on the current GPU, to be repeated by one launch each. Nothing is computed while it is recorded."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._stream = torch.cuda.Stream()

    def record(self, work: Callable[[], Any]) -> Any:
        """What `work` returns: tensors without values, until it is repeated."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = self._graphs[0].pool() if self._graphs else torch.cuda.graph_pool_handle()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph, which collects garbage and empties torch's cache first: half a second.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                made = work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        self._graphs.append(graph)
        return made

    def repeat(self, index: int) -> None:
        """Do what was recorded as number `index`."""
        self._graphs[index].replay()


class Pass:
    """A pass through a model. ended: its backward pass has been."""

    ended = False


class Recorded:
    """A compilation and its gradients, recorded.

    - `make`: returns evaluators, which are series or tables made together, numbers for the host, and anything else.
    - `inputs`, `tables`: return what it reads, without gradients and with.
    - `graphs`: see `Graphs`.
    """

    def __init__(
        self, make: Callable[[], tuple[Sequence[Evaluator], Tensor, Any]], inputs: Callable[[], Sequence[Tensor]],
        tables: Callable[[], Sequence[Tensor]], graphs: Any,
    ) -> None:  # fmt: skip
        self._graphs, self._inputs, self._tables = graphs, inputs, tables
        self._known = self._read()
        self._made: Sequence[Evaluator]
        self._numbers: Tensor
        self._made, self._numbers, self.rest = graphs.record(make)
        self.parameters = [parameter for evaluator in self._made for parameter in evaluator.parameters]
        self._upstream = [torch.zeros_like(parameter) for parameter in self.parameters]
        trained = [table for table in tables() if table.requires_grad]
        self._gradients: Sequence[Tensor | None] = graphs.record(
            lambda: torch.autograd.grad(self.parameters, trained, self._upstream, allow_unused=True)
        )
        self._run = 0
        self._open: ref[Pass] | None = None

    def _read(self) -> list[tuple[int, torch.dtype, bool]]:
        """What tells whether the inputs are still the same tensors."""
        return [(t.data_ptr(), t.dtype, t.requires_grad) for t in (*self._inputs(), *self._tables())]

    def serves(self) -> bool:
        """Whether it reads what there is now, and no backward pass is still to come that needs what it holds."""
        last = None if self._open is None else self._open()
        return (last is None or last.ended) and self._read() == self._known

    def repeat(self) -> Tensor:
        """Compile again. Returns the numbers for the host."""
        self._run += 1
        self._graphs.repeat(0)
        return self._numbers

    def evaluators(self, degrees: Sequence[int]) -> list[Evaluator | Split]:
        """The evaluators after `repeat`, with a new graph of autograd. degrees: see `Series`."""
        this = Pass()
        self._open = ref(this)
        parameters = iter(_Renewed.apply(self, self._run, this, *self._tables()))  # type: ignore[no-untyped-call]
        found: list[Evaluator | Split] = []
        for old, degree in zip(self._made, degrees, strict=True):
            if isinstance(old, Series):
                found.append(Series(next(parameters), old.packed, degree))
            else:
                assert isinstance(old, Row)
                found.append(Row(next(parameters), old.half, old.packed, old.path))
        return found

    def pull_back(self, run: int, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients to the tables. Raises InputError if it has been repeated since."""
        if run != self._run:
            raise InputError(
                "φ has changed since the forward pass of this second backward pass: call the model again, or compute "
                "all backward passes of a forward pass before the next one"
            )
        given = [(held, g) for held, g in zip(self._upstream, upstream, strict=True) if g is not None]
        missing = [held for held, g in zip(self._upstream, upstream, strict=True) if g is None]
        if given:
            torch._foreach_copy_([held for held, _ in given], [g for _, g in given])
        if missing:
            torch._foreach_zero_(missing)
        self._graphs.repeat(1)
        found = iter(self._gradients)
        grads = [next(found) if table.requires_grad else None for table in self._tables()]
        return [None if g is None else g.clone() for g in grads]


class _Renewed(torch.autograd.Function):
    """What the graph holds, with gradients to the tables."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, run: int, this: Pass, *tables: Tensor) -> tuple[Tensor, ...]:
        ctx.recorded, ctx.run, ctx.this = recorded, run, this
        ctx.set_materialize_grads(False)
        return tuple(parameter.detach() for parameter in recorded.parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.this.ended = True
        return None, None, None, *ctx.recorded.pull_back(ctx.run, upstream)
