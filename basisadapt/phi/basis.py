"""The contract of a basis: one elementwise function b(u), and how u is made of x, ω and a grid point."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from basisadapt.core.errors import unknown
from basisadapt.core.ranges import Range
from basisadapt.core.registry import Registry

BASES: Registry[TransferBasis] = Registry("basis")

SEEN, FINE = 8, 512  # of a basis, to see how narrow it is: the range of u, and samples per unit

ARGUMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "shifted": lambda x, omega, grid: omega * (x - grid),
    "phase": lambda x, omega, grid: omega * x + grid,
    "scaled": lambda x, omega, grid: omega * x,
}


class TransferBasis(ABC):
    """One function b of a basis {b(uᵢ(x))}, from which φ(x) = Σᵢ αᵢ b(uᵢ(x)) is built (paper, section 3.3).

    Subclass it with a name and define `forward`; that is all:

        class Morlet(TransferBasis, name="morlet"):
            def forward(self, u):
                return torch.cos(5 * u) * torch.exp(-u.square() / 2)

    `argument` says how u depends on x, the bandwidth ωᵢ > 0 and the grid point xᵢ: "shifted" (the default)
    uᵢ = ωᵢ (x − xᵢ), "phase" uᵢ = ωᵢ x + xᵢ, or "scaled" uᵢ = ωᵢ x, for functions that have no place on a grid.
    `search` maps settings of an adapter to the ranges in which a search should look for them with this basis, such as
    {"omega_init": Range(0.5, 10, log=True)}; settings that it leaves out keep their general range.
    `support` and `jumps` make tables quick and change nothing else: beyond ±support b is zero to within rounding, and
    of a cubic spline that is zero beyond its knots `jumps` maps each knot to the jump of the third derivative there.
    `basisadapt.testing.check_basis` checks a basis against the contract.
    """

    argument: ClassVar[str]
    support: ClassVar[float] = math.inf
    jumps: ClassVar[Mapping[float, float]] = {}
    search: ClassVar[Mapping[str, Range]] = {}

    def __init_subclass__(cls, *, name: str | None = None, argument: str = "shifted", **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError for a name that is taken or an unknown argument."""
        super().__init_subclass__(**kwargs)
        if argument not in ARGUMENTS:
            raise unknown("argument of a basis", argument, ARGUMENTS)
        cls.argument = argument
        if "forward" in vars(cls):  # what is known of another b is not true of this one
            for known in {"support", "jumps", "values"} - vars(cls).keys():
                setattr(cls, known, vars(TransferBasis)[known])
        if name is not None:
            BASES.add(name, cls)

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """b(u), elementwise, in torch operations: u has any shape, the result has u's shape, dtype and device."""

    def values(self, u: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
        """b(u) and, if `slopes`, b'(u), without gradients; override it where there is a quicker way. u may be
        overwritten.

        Each may be off by some units in the last place of its largest value; b' near zero by 1e-7 of it.
        """
        with torch.set_grad_enabled(slopes):
            u = u.detach().requires_grad_(slopes)
            b = self.forward(u)
            (slope,) = torch.autograd.grad(b.sum(), u) if slopes else (b,)
        return b.detach(), slope

    def __call__(self, x: Tensor, omega: Tensor, grid: Tensor) -> Tensor:
        """b(u(x, ω, grid)), shapes broadcast against each other."""
        return self.forward(ARGUMENTS[self.argument](x, omega, grid))


@functools.cache
def width(basis: type[TransferBasis]) -> float:
    """How narrow b is, in units of u: max |b| over its steepest rise, by differences on [−8, 8]; 0 for a pole.

    Whoever samples φ at places much further apart than width / ω may pass over one of its functions.
    """
    with torch.inference_mode(False), torch.no_grad():
        u = torch.linspace(-SEEN, SEEN, 2 * SEEN * FINE + 1, dtype=torch.float64, device="cpu")
        b = basis().forward(u)
        ratio = b.abs().amax() / (b.diff().abs().amax() * FINE).clamp_min(1e-300)
    return float(ratio.nan_to_num(0.0))
