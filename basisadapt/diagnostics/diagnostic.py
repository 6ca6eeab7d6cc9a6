"""The contract of a diagnostic: a number of every adapted module, whatever its method."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from basisadapt.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

DIAGNOSTICS: Registry[Diagnostic] = Registry("diagnostic")


class Diagnostic(ABC):
    """A number of every adapted module that has a ΔW. Subclass it with a name and define `number`.

    It is taken when a run starts, at its snapshots and at its end. A result has the last of them, where it is finite,
    under its name in `modules`, and their mean over the modules as the metric "<name>.mean", which every table shows.
    """

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            DIAGNOSTICS.add(name, cls)

    @abstractmethod
    def number(self, change: Tensor, layer: Any) -> float:
        """The number of one module; it draws no random numbers.

        change: ΔW, shape (out_features, in_features) or, over a Conv1D, transposed; without gradient, finite. layer:
        the module itself, a layer of peft's; W is `layer.get_base_layer().weight`.
        """


def means(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number, as "<name>.mean", over those that have it."""
    names = dict.fromkeys(name for one in numbers for name in one)
    return {f"{name}.mean": statistics.fmean(one[name] for one in numbers if name in one) for name in names}
