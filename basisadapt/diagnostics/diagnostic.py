"""The contract of a diagnostic: a number for every adapted module, whatever its method."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from basisadapt.core.registry import Registered, Registry

if TYPE_CHECKING:
    from torch import Tensor

DIAGNOSTICS: Registry[Diagnostic] = Registry("diagnostic")


class Diagnostic(Registered, ABC):
    """A number for every adapted module that has a ΔW. Subclass it with a name and define `number`.

    It is measured at the start of a run, at its snapshots and at its end. The result keeps the last value, if it is
    finite, under the diagnostic's name in `modules`, and the mean over the modules as the metric `"NAME.mean"`, which
    every table shows.
    """

    registry = DIAGNOSTICS

    @abstractmethod
    def number(self, change: Tensor, layer: Any) -> float:
        """The number of one module. It must draw no random numbers.

        - `change`: ΔW, shape (out_features, in_features), transposed over a Conv1D; finite, without gradient.
        - `layer`: the module, a peft layer; W is `layer.get_base_layer().weight`.
        """


def means(numbers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number, as `"NAME.mean"`, over the mappings that have it."""
    names = dict.fromkeys(name for one in numbers for name in one)
    return {f"{name}.mean": statistics.fmean(one[name] for one in numbers if name in one) for name in names}
