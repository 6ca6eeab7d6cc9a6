"""The evaluators of one adapter's modules, compiled together once a step."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from basisadapt.core.errors import InputError
from basisadapt.phi import choice
from basisadapt.phi.bank import Transfer, TransferBank
from basisadapt.phi.choice import Choice, Work, default_tolerance, evaluator
from basisadapt.phi.dense_gradient import EXACT, DenseGradient
from basisadapt.phi.evaluators import Direct, Evaluator, Split
from basisadapt.phi.kernels import resolve_backend
from basisadapt.phi.operators import Call, Function, Link, Linked, Memory, fill, linked
from basisadapt.phi.weight import Execution

HALF_ROUNDING = 1 + 2**-7  # under FSDP, A and B may each be rounded to bfloat16 for their layer
HOOK = "_hf_hook"  # the attribute in which accelerate keeps a module's hook
Adapted = tuple[nn.ParameterDict, nn.ParameterDict, nn.Module]  # the holders of A and of B, and the frozen layer


@dataclass(frozen=True)
class Compiled:
    """The functions of all modules, and the values from which they were compiled.

    - `functions`: by module.
    - `differentiable`: they have gradients. They then also serve passes without.
    - `tables`, `trained`: copies of the bank's tables, and whether each trained.
    - `tolerances`: of every module.
    - `factors`: copies of A and B by module; None if FSDP shards them.
    - `linked`: what torch.compile reads of the functions, see `operators`.
    """

    functions: Mapping[str, Function]
    differentiable: bool
    tables: tuple[Tensor, ...]
    trained: tuple[bool, ...]
    tolerances: tuple[float, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]] | None
    linked: Sequence[Linked]

    def made_of(self, module: str, A: Tensor, B: Tensor, tables: tuple[Tensor, ...]) -> bool:
        """Whether the functions were compiled from these factors and tables.

        Values are compared: an assignment through `.data` and a fused optimizer step keep a tensor's version.
        """
        if self.factors is None:
            return True
        now, then = (A, B, *tables), (*self.factors[module], *self.tables)
        if self.trained != tuple(t.requires_grad for t in tables):
            return False
        if any(a.dtype != b.dtype or a.device != b.device for a, b in zip(now, then, strict=True)):
            return False
        if A.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        return all(map(torch.equal, now, then))


class Compiler:
    """Keeps every module's evaluator up to date with A, B and the bank's tables.

    - `modules`: for every module of the bank, by name, the dictionaries that hold A and B under the adapter's name, and
      the frozen layer.
    - `backend`: the setting, see `PhiSettings`.
    - `tolerance`: None takes what the weight's dtype hides, see `default_tolerance`.
    - `dense`: see `Execution`.
    - `links`: what torch.compile reads of every module's function; `compiled` sets it before the first layer is called.

    If FSDP shards A and B, a layer computes with temporary copies, which do not show updates. `PhiModel` therefore
    compiles all modules from the shards before the first layer is called.
    """

    def __init__(
        self, bank: TransferBank, adapter: str, modules: Mapping[str, Adapted], backend: str, tolerance: float | None,
        dense: DenseGradient = EXACT,
    ) -> None:  # fmt: skip
        self.bank, self._call = bank, Call()
        self.links = {name: Link(self._call) for name in modules}
        self._adapter, self._modules, self._setting, self._tolerance = adapter, modules, backend, tolerance
        self._dense = dense
        self._forget()

    def _forget(self) -> None:
        self._choice = Choice()
        self._chosen_for: tuple[Any, ...] = ()  # the device, the dtypes and the loaded state of `_choice`
        self._kept: list[Compiled] = []  # at most one with gradients and one without, the newest first
        self._in_call = threading.local()  # what this thread's current call of the model uses
        self._linked: Compiled | None = None  # what the links point to
        self._may_be_traced = False  # as the links know it
        self._memory = Memory()
        self._call.under_way = False
        self._one_at_a_time = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, without the compiled functions."""
        kept = ("bank", "links", "_call", "_adapter", "_modules", "_setting", "_tolerance", "_dense")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, with nothing compiled."""
        self.__dict__.update(state)
        self._forget()

    def backend(self, device: torch.device) -> str:
        """The backend on that device: "torch", "triton" or "direct". Raises InputError if it cannot run there."""
        return resolve_backend(self._setting, device)

    def _pair(self, module: str) -> tuple[Tensor, Tensor]:
        in_a, in_b, _ = self._modules[module]
        # Direct reads: a look-up in nn.ParameterDict takes microseconds, and a model has hundreds of modules.
        A: Any = in_a._parameters[self._adapter]
        B: Any = in_b._parameters[self._adapter]
        return A, B

    def _tolerance_of(self, module: str) -> float:
        layer: Any = self._modules[module][2]
        return self._tolerance or default_tolerance(layer.weight.dtype)

    def function(self, module: str, A: Tensor, B: Tensor) -> Function:
        """The function of one module with these factors; compiles all modules if anything has changed."""
        wanted = torch.is_grad_enabled()
        held: Compiled | None = getattr(self._in_call, "compiled", None)
        if held is not None and (held.differentiable or not wanted):
            return held.functions[module]
        for place, compiled in enumerate(self._kept):
            if compiled.differentiable or not wanted:
                # A checkpointed layer's second forward pass uses what the first did; to compare would wait for a GPU.
                again = place == 0 and A.is_cuda and _in_backward()
                if again or compiled.made_of(module, A, B, self.bank.tables):
                    return compiled.functions[module]
        made: Compiled = self.refresh()
        return made.functions[module]

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compile if anything has changed. Meanwhile layers do not check again, which takes microseconds in each."""
        before: Compiled | None = getattr(self._in_call, "compiled", None)
        self._in_call.compiled = self._current_linked()
        self._call.under_way = True
        try:
            yield
        finally:
            self._in_call.compiled, self._call.under_way = before, before is not None
            if before is not None:
                self._link(before)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _current_linked(self) -> Compiled:
        """The functions of the current factors and tables, to which the links point."""
        current = self._current()
        self._link(current)
        return current

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _link(self, compiled: Compiled) -> None:
        may_be_traced = "torch._dynamo" in sys.modules
        if self._linked is not compiled or self._may_be_traced != may_be_traced:
            self._linked, self._may_be_traced = compiled, may_be_traced
            for (name, function), of_graph in zip(compiled.functions.items(), compiled.linked, strict=True):
                self.links[name].point_to(of_graph, function, may_be_traced)
            fill(compiled.functions.values(), compiled.linked)

    def _check(self, module: str, function: Function, A: Tensor, B: Tensor) -> None:
        """Raise InputError if a compiled graph uses a function that does not belong to these factors."""
        held: Compiled | None = getattr(self._in_call, "compiled", None)
        if held is not None and held.functions[module] is function:
            return
        for compiled in self._kept:
            again = A.is_cuda and _in_backward()
            if compiled.functions[module] is function and (again or compiled.made_of(module, A, B, self.bank.tables)):
                return
        raise InputError(
            f"a compiled part of the model, with {module!r} in it, was called by itself after φ had changed: call the "
            "peft model, which brings φ up to date, or leave that part uncompiled"
        )

    def _current(self) -> Compiled:
        """The functions of the current factors and tables, compiled if there are none."""
        if not any(choice.deferred(A) or hasattr(A, "full_tensor") for A, _ in map(self._pair, self._modules)):
            pairs, tables = {name: self._pair(name) for name in self._modules}, self.bank.tables
            tolerances = tuple(map(self._tolerance_of, pairs))
            for compiled in self._kept:
                serves = compiled.differentiable or not torch.is_grad_enabled()
                same = serves and compiled.factors is not None and compiled.tolerances == tolerances
                if same and all(compiled.made_of(name, *pair, tables) for name, pair in pairs.items()):
                    return compiled
        made: Compiled = self.refresh()
        return made

    @torch.no_grad()
    def transfer(self, module: str) -> Transfer:
        """The transfer function of one module, not compiled."""
        gains = self.bank.gains([self._pair(name) for name in self._modules])
        return self.bank.transfer(module, gains[list(self._modules).index(module)])

    @torch.no_grad()
    def fresh(self, module: str) -> Evaluator | Split:
        """A new evaluator of one module for its current factors and tables, for a ΔW that leaves the model.

        The host waits for the device. Nothing is kept. Raises InputError for factors on the meta device.
        """
        with self._one_at_a_time, torch.inference_mode(False):
            pairs, sharded = self._gathered()
            A, B = pairs[list(self._modules).index(module)]
            with torch.autocast(A.device.type, enabled=False):
                gains = self.bank.gains(pairs)
                transfer = self.bank.kept_transfer(module, gains[list(self._modules).index(module)], self.bank.tables)
                slack = HALF_ROUNDING if sharded else 1.0
                return evaluator(transfer, A, B, self._setting, self._tolerance_of(module), slack)

    def _gathered(self) -> tuple[list[tuple[Tensor, Tensor]], bool]:
        """A and B of every module, and whether they had to be gathered. Raises InputError on the meta device."""
        for module in chain([self.bank], *(holders[:2] for holders in self._modules.values())):
            if HOOK in module.__dict__:  # a model has hundreds of modules, and a call for each takes the host long
                onload(module)
        pairs = [self._pair(name) for name in self._modules]
        sharded = any(hasattr(A, "full_tensor") for A, _ in pairs)
        if pairs[0][0].is_meta:
            raise InputError(
                f"adapter {self._adapter!r} is on the meta device, where it has no values: offload a model after its "
                "adapter is in it, and without preload_module_classes"
            )
        return [(_whole(A), _whole(B)) for A, B in pairs] if sharded else pairs, sharded

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def refresh(self) -> Compiled:
        """Compile every module's function for the current factors. Raises InputError for factors on the meta device."""
        wanted = torch.is_grad_enabled()
        # Tensors made under inference_mode could not be used in training.
        with self._one_at_a_time, torch.inference_mode(False), torch.set_grad_enabled(wanted):
            made = self._compile(wanted)
            # Functions with gradients also serve passes without, so they replace all others.
            self._kept = [made] if wanted else [made, *(old for old in self._kept if old.differentiable)]
        return made

    def _compile(self, wanted: bool) -> Compiled:
        given, sharded = self._gathered()
        names = list(self._modules)
        device = given[0][0].device
        of_now = device, self.bank.loaded, *(A.dtype for A, _ in given)
        if of_now != self._chosen_for:
            self._choice, self._chosen_for = Choice(), of_now
        tolerances = tuple(map(self._tolerance_of, names))
        alike = [name.rpartition(".")[2] for name in names]

        def make() -> Work:
            return self._work(given, sharded, tolerances, alike)

        with torch.autocast(device.type, enabled=False):
            if self._setting == "direct":
                work = make()
                evaluators: list[Evaluator | Split] = [Direct(work.single(index)) for index in range(len(names))]
            elif sharded:
                work = make()
                evaluators = self._choice.evaluators(work)
            else:
                this = weakref.ref(self)
                work, evaluators = self._choice.renewed(
                    make, functools.partial(_factors, this), functools.partial(_tables, this)
                )
        kept = None if sharded else dict(zip(names, work.pairs, strict=True))
        ways = {where: Execution(self.backend(where), self._dense) for where in {A.device for A, _ in given}}
        functions = [
            Function(evaluator, ways[A.device], functools.partial(_check, weakref.ref(self), name))
            for name, evaluator, (A, _) in zip(names, evaluators, given, strict=True)
        ]
        return Compiled(
            dict(zip(names, functions, strict=True)), wanted, work.copies,
            tuple(table.requires_grad for table in self.bank.tables), tolerances, kept,
            linked(functions, self._memory, alike),
        )  # fmt: skip

    def _work(
        self, given: list[tuple[Tensor, Tensor]], sharded: bool, tolerances: tuple[float, ...], alike: Sequence[str]
    ) -> Work:
        """What there is to compile now, from copies of all that may change. The host waits for nothing."""
        pairs = given
        if not sharded:
            with torch.no_grad():
                # A product with 1 copies many tensors in one kernel launch.
                held = iter(torch._foreach_mul([factor for pair in given for factor in pair], 1))
            pairs = list(zip(held, held, strict=True))
        copies = tuple(table.detach().clone() for table in self.bank.tables)
        gains, names = self.bank.gains(pairs).detach(), list(self._modules)

        def single(index: int) -> Transfer:
            return self.bank.kept_transfer(names[index], gains[index], copies)

        slack = HALF_ROUNDING if sharded else 1.0
        return Work(
            self.bank.functions(gains), self.bank.tables, single, pairs, gains, tolerances, slack, alike, copies
        )


def _factors(compiler: weakref.ref[Compiler]) -> Sequence[Tensor]:
    """A and B of all modules; by a weak reference, as `_check`."""
    held = compiler()
    assert held is not None, "the model that calls holds its compiler"
    return [factor for name in held._modules for factor in held._pair(name)]


def _tables(compiler: weakref.ref[Compiler]) -> Sequence[Tensor]:
    """The bank's tables, in the same way."""
    held = compiler()
    assert held is not None, "the model that calls holds its compiler"
    return held.bank.tables


def _check(compiler: weakref.ref[Compiler], module: str, function: Function, A: Tensor, B: Tensor) -> None:
    """`Compiler._check`, by a weak reference: autograd's nodes hold functions, and a cycle through them would stay."""
    held = compiler()
    assert held is not None, "the layer that calls holds its compiler"
    held._check(module, function, A, B)


def _in_backward() -> bool:
    """Whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() >= 0


@torch.no_grad()
def _whole(tensor: Any) -> Tensor:
    """The tensor, gathered if it is a DTensor."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def onload(module: nn.Module) -> None:
    """Load what accelerate has offloaded of an adapter, and keep it loaded.

    Accelerate's hook would load it only for the module's own forward pass, but an adapter is also read outside. As
    always with accelerate, the parameters are new objects, which an existing optimizer does not know.
    """
    hook: Any = vars(module).get(HOOK)
    if getattr(hook, "offload", False):
        with torch.inference_mode(False):
            hook.pre_forward(module)
        hook.offload = False
