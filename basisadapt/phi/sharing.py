"""Which adapted modules share which parameters of φ (paper, Table 20)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from basisadapt.core.ranges import Range
from basisadapt.core.registry import Registered, Registry

SHARING: Registry[SharingPolicy] = Registry("sharing")


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module.

    - `name` (str): its name in the model.
    - `kind` (str): "attention", "mlp" or "other".
    - `layer` (int or None): the index of its block; None outside the blocks.
    - `in_features` (int or None, default None): of its weight; None if unknown.
    """

    name: str
    kind: str
    layer: int | None
    in_features: int | None = None


class SharingPolicy(Registered, ABC):
    """Groups modules; the modules of one group share one row of a parameter's table. Subclass it with a name.

    search (default empty): search ranges of settings with this policy, as in `TransferBasis`.
    """

    registry = SHARING
    search: ClassVar[Mapping[str, Range]] = {}

    @abstractmethod
    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The group of `module` for `parameter` ("x", "omega" or "alpha"). Modules with equal groups share a row."""


class ShareNone(SharingPolicy, name="none"):
    """Every module has a φ of its own (the paper's default)."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The module's name, so no two modules share."""
        return module.name


class ShareGrid(SharingPolicy, name="x"):
    """All modules share one grid x; each has its own α and ω."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group for x; the module's name for α and ω."""
        return None if parameter == "x" else module.name


class ShareOmega(SharingPolicy, name="omega"):
    """All modules share one set of bandwidths ω; each has its own α and x."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group for ω; the module's name for α and x."""
        return None if parameter == "omega" else module.name


class ShareAlpha(SharingPolicy, name="alpha"):
    """All modules share one set of amplitudes α; each has its own ω and x."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """One group for α; the module's name for ω and x."""
        return None if parameter == "alpha" else module.name


class ShareAll(SharingPolicy, name="all"):
    """All modules share one φ."""

    # The gradients of all modules add up, so the same learning rate has more effect.
    search: ClassVar[Mapping[str, Range]] = {"transfer_lr": Range(0.003, 3.0, log=True)}

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The same group for every module and parameter."""
        return None


class ShareKind(SharingPolicy, name="kind"):
    """The attention modules share one φ, the MLP modules another."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The module's kind, for every parameter."""
        return module.kind


class ShareLayer(SharingPolicy, name="layer"):
    """The modules of one layer share one φ; a module outside the layers has one of its own."""

    def group(self, parameter: str, module: AdaptedModule) -> Hashable:
        """The index of the module's layer, or else its name, for every parameter."""
        return module.name if module.layer is None else module.layer


def rows(policy: SharingPolicy, parameter: str, modules: Sequence[AdaptedModule]) -> list[int]:
    """The row of `parameter`'s table that each module uses. Rows are numbered in the order in which groups appear."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(policy.group(parameter, module), len(numbers)) for module in modules]
