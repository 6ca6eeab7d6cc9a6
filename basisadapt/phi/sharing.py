"""Which adapted modules share which parameters of φ (paper, Table 20)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from basisadapt.core.ranges import Range
from basisadapt.core.registry import Registry

SHARING: Registry[SharingPolicy] = Registry("sharing")


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: its name in the model, its kind ("attention", "mlp" or "other") and the block's index.

    in_features: of its weight; None where nobody asked.
    """

    name: str
    kind: str
    layer: int | None
    in_features: int | None = None


class SharingPolicy(ABC):
    """A grouping: modules of one group share one row of a parameter's table. Subclass it with a name.

    `search`: ranges of settings under this policy, as in `TransferBasis`.
    """

    search: ClassVar[Mapping[str, Range]] = {}

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            SHARING.add(name, cls)

    @abstractmethod
    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The group of `module` for `parameter` ("x", "omega" or "alpha"); equal groups share."""


class ShareNone(SharingPolicy, name="none"):
    """Every module has a φ of its own (the paper's default)."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The module itself."""
        return module.name


class ShareGrid(SharingPolicy, name="x"):
    """One grid for all modules."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group for x."""
        return None if parameter == "x" else module.name


class ShareOmega(SharingPolicy, name="omega"):
    """One set of bandwidths for all modules."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group for omega."""
        return None if parameter == "omega" else module.name


class ShareAlpha(SharingPolicy, name="alpha"):
    """One set of amplitudes for all modules."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group for alpha."""
        return None if parameter == "alpha" else module.name


class ShareAll(SharingPolicy, name="all"):
    """One φ for the whole model."""

    # Every module adds its gradient, so that a rate means more.
    search: ClassVar[Mapping[str, Range]] = {"transfer_lr": Range(0.003, 3.0, log=True)}

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group."""
        return None


class ShareKind(SharingPolicy, name="kind"):
    """One φ for the attention's modules and one for the MLP's."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """A group per kind."""
        return module.kind


def rows(policy: SharingPolicy, parameter: str, modules: Sequence[AdaptedModule]) -> list[int]:
    """The row of `parameter`'s table that each module uses; rows are numbered as their groups first appear."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(policy.group(parameter, module), len(numbers)) for module in modules]
