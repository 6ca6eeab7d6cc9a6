"""The contract of a basis: one elementwise function b(u), and how u depends on x, ω and a grid point."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from basisadapt.core.errors import InputError, one_line, refused, unknown
from basisadapt.core.ranges import Range
from basisadapt.core.registry import Registered, Registry

BASES: Registry[TransferBasis] = Registry("basis")

SEEN, FINE = 8, 512  # `width` samples u on ±SEEN, FINE times per unit

ARGUMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "shifted": lambda x, omega, grid: omega * (x - grid),
    "phase": lambda x, omega, grid: omega * x + grid,
    "scaled": lambda x, omega, grid: omega * x,
}


class TransferBasis(Registered, ABC):
    """The function b of a basis {b(uᵢ(x))}, from which φ(x) = Σᵢ αᵢ b(uᵢ(x)) is built (paper, section 3.3).

    Subclass it with a name and define `forward`:

        class Morlet(TransferBasis, name="morlet"):
            def forward(self, u):
                return torch.cos(5 * u) * torch.exp(-u.square() / 2)

    - `argument` (default "shifted"): how u depends on x, the bandwidth ωᵢ > 0 and the grid point xᵢ: "shifted" is
      uᵢ = ωᵢ (x − xᵢ), "phase" uᵢ = ωᵢ x + xᵢ, and "scaled" uᵢ = ωᵢ x, for functions without a place on a grid.
    - `support` (default ∞): b is zero to within rounding for |u| > support.
    - `jumps` (default empty): for a cubic spline that is zero beyond its knots, each knot and the jump of the third
      derivative there. `support` and `jumps` only make evaluation faster.
    - `search` (default empty): settings of an adapter and the ranges in which to search for them with this basis, such
      as `{"omega_init": Range(0.5, 10, log=True)}`. Other settings keep their general range.

    `basisadapt.testing.check_basis` checks a basis against this contract.
    """

    registry = BASES
    argument: ClassVar[str]
    support: ClassVar[float] = math.inf
    jumps: ClassVar[Mapping[float, float]] = {}
    search: ClassVar[Mapping[str, Range]] = {}

    def __init_subclass__(cls, *, argument: str = "shifted", **kwargs: Any) -> None:
        """Register the class as `Registered` does. Raises InputError for an unknown argument, too."""
        if argument not in ARGUMENTS:
            raise unknown("argument of a basis", argument, ARGUMENTS)
        cls.argument = argument
        if "forward" in vars(cls):  # what is known of an inherited b does not hold for this one
            for known in {"support", "jumps", "values"} - vars(cls).keys():
                setattr(cls, known, vars(TransferBasis)[known])
        super().__init_subclass__(**kwargs)

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """b(u), elementwise, in torch operations: u has any shape, the result has u's shape, dtype and device."""

    def values(self, u: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
        """b(u) and, if `slopes`, b'(u), in the shape of u, without gradients. Override it if there is a faster way.

        The call may overwrite u. Each result may be off by a few units in the last place of its largest value, and b'
        near u = 0 by 1e-7 of it. Without `slopes`, the second tensor is meaningless.
        """
        with torch.set_grad_enabled(slopes):
            u = u.detach().requires_grad_(slopes)
            b = self.forward(u)
            (slope,) = torch.autograd.grad(b.sum(), u) if slopes else (b,)
        return b.detach(), slope

    def __call__(self, x: Tensor, omega: Tensor, grid: Tensor) -> Tensor:
        """b(u(x, ω, grid)), elementwise; the three shapes are broadcast against each other."""
        return self.forward(ARGUMENTS[self.argument](x, omega, grid))


@functools.cache
def check_values(basis: type[TransferBasis]) -> None:
    """Raise InputError for a basis whose b(u) fails, is no tensor like u, or is not a number somewhere on [−8, 8]."""
    u = torch.linspace(-SEEN, SEEN, 4 * SEEN + 1, dtype=torch.float64, device="cpu").reshape(1, -1)
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            b: Any = basis().forward(u.clone())
    except Exception as error:  # of somebody else's code
        raise InputError(f"{basis.__name__}.forward cannot be evaluated: {one_line(error)}") from error
    if not isinstance(b, Tensor):
        raise refused(f"the value of {basis.__name__}.forward", b, "a tensor")
    for what, found, expected in (("shape", tuple(b.shape), tuple(u.shape)), ("dtype", b.dtype, u.dtype)):
        if found != expected:
            raise InputError(f"{basis.__name__}.forward must keep the {what} of its input, {expected}, got {found}")
    if b.isnan().any():
        raise InputError(f"{basis.__name__}.forward must be a number everywhere, and is NaN at {u[b.isnan()][0]:g}")


@functools.cache
def width(basis: type[TransferBasis]) -> float:
    """How narrow b is, in units of u: max |b| / max |b'|, by finite differences on [−8, 8]; 0 if b has a pole.

    Samples of φ that are much further apart than width / ω can miss one of its functions.
    """
    with torch.inference_mode(False), torch.no_grad():
        u = torch.linspace(-SEEN, SEEN, 2 * SEEN * FINE + 1, dtype=torch.float64, device="cpu")
        b = basis().forward(u)
        ratio = b.abs().amax() / (b.diff().abs().amax() * FINE).clamp_min(1e-300)
    return float(ratio.nan_to_num(0.0))
