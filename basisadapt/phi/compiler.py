"""The evaluators of one adapter's modules, compiled together once a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from basisadapt.errors import InputError
from basisadapt.phi.bank import Transfer, TransferBank
from basisadapt.phi.choice import Choice, compute_dtype, radii
from basisadapt.phi.evaluators import Direct, Evaluator
from basisadapt.phi.kernels import resolve_backend

HALF_ROUNDING = 1 + 2**-7  # A and B may each be rounded to bfloat16 for their layer


class Compiler:
    """Keeps every module's evaluator in step with A, B and the bank's tables.

    factors: of every module of the bank, by name, the dictionaries that hold A and B under the adapter's name.

    Where FSDP shards A and B, a layer computes with copies, which are there only while the layer is at work and tell
    nothing of updates. So all modules are compiled from the shards before the first layer, by `PhiModel`.
    """

    def __init__(
        self,
        bank: TransferBank,
        adapter: str,
        factors: Mapping[str, tuple[nn.ParameterDict, nn.ParameterDict]],
        backend: str,
        tolerance: float,
    ) -> None:
        self.bank = bank
        self._adapter, self._factors, self._setting, self._tolerance = adapter, factors, backend, tolerance
        self._forget()

    def _forget(self) -> None:
        self._choice, self._sharded = Choice(), False
        self._chosen_for: tuple[torch.device, torch.dtype] | None = None  # what the choice was made for
        self._settled: bool | None = None  # in `compiled`: whether gradients were asked for when it began
        self._evaluators: dict[str, Evaluator] = {}
        self._gains: Tensor | None = None
        self._made_of: dict[str, tuple[Any, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: not the compiled functions, which are of this moment."""
        kept = ("bank", "_adapter", "_factors", "_setting", "_tolerance")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__dict__.update(state)
        self._forget()

    def backend(self, device: torch.device) -> str:
        """What evaluates modules there: "torch", "triton" or "direct". Raises InputError if it cannot."""
        return resolve_backend(self._setting, device)

    def _pair(self, module: str) -> tuple[Tensor, Tensor]:
        in_a, in_b = self._factors[module]
        return in_a[self._adapter], in_b[self._adapter]

    def evaluator(self, module: str, A: Tensor, B: Tensor) -> Evaluator:
        """The evaluator of one module with these factors; compiles all where something has changed since."""
        settled = self._settled is torch.is_grad_enabled()
        if not settled and self._made_of.get(module) != self._state(A, B, _versions(self.bank.tables)):
            self.refresh()
        return self._evaluators[module]

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compile, and hold that for true meanwhile: to look again costs every layer microseconds."""
        self.refresh()
        self._settled = torch.is_grad_enabled()
        try:
            yield
        finally:
            self._settled = None

    def transfer(self, module: str, A: Tensor, B: Tensor) -> Transfer:
        """The function of one module with these factors, as it is before it is compiled."""
        self.evaluator(module, A, B)
        assert self._gains is not None
        return self.bank.transfer(module, self._gains[list(self._factors).index(module)])

    def _state(self, A: Tensor, B: Tensor, of_tables: tuple[int, ...]) -> tuple[Any, ...]:
        """What an evaluator was made of: changes with every update in place."""
        if self._sharded:
            return (torch.is_grad_enabled(),)
        return (*_versions((A, B)), *of_tables, A.device, A.dtype, torch.is_grad_enabled())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def refresh(self) -> None:
        """Compile every module's function for the factors of this moment. Raises InputError for those on meta."""
        names = list(self._factors)
        for module in chain([self.bank], *self._factors.values()):
            onload(module)
        held = [self._pair(name) for name in names]
        self._sharded = any(hasattr(A, "full_tensor") for A, _ in held)
        pairs = [(_whole(A), _whole(B)) for A, B in held] if self._sharded else held
        dtype, device = compute_dtype(pairs[0][0]), pairs[0][0].device
        if device.type == "meta":
            raise InputError(
                f"adapter {self._adapter!r} is on the meta device, where it has no values: offload a model after its "
                "adapter is in it, and without preload_module_classes"
            )
        if (device, dtype) != self._chosen_for:
            self._choice, self._chosen_for = Choice(), (device, dtype)
        with torch.autocast(device.type, enabled=False):
            self._gains = gains = self.bank.gains(pairs)

            def single(index: int) -> Transfer:
                return self.bank.transfer(names[index], gains[index])

            if self._setting == "direct":
                evaluators: list[Evaluator] = [Direct(single(index), dtype) for index in range(len(names))]
            else:
                tables = (self.bank.alpha, self.bank.raw_omega, self.bank.grid, gains)
                radius = radii(pairs, gains.detach()) * (HALF_ROUNDING if self._sharded else 1)
                evaluators = self._choice.evaluators(
                    self.bank.transfers, tables, single, radius, self._tolerance, dtype
                )
        self._evaluators = dict(zip(names, evaluators, strict=True))
        of_tables = _versions(self.bank.tables)
        self._made_of = {name: self._state(*pair, of_tables) for name, pair in zip(names, held, strict=True)}


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


@torch.no_grad()
def _whole(tensor: Any) -> Tensor:
    """The tensor, gathered where it is a DTensor."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def onload(module: nn.Module) -> None:
    """Bring back, for good, what accelerate has offloaded of an adapter.

    Its hook would do so for the module's own forward pass alone, and an adapter is read outside of that. As everywhere
    with accelerate, the parameters are new ones, which an optimiser from before does not know.
    """
    hook: Any = vars(module).get("_hf_hook")
    if getattr(hook, "offload", False):
        with torch.inference_mode(False):
            hook.pre_forward(module)
        hook.offload = False
