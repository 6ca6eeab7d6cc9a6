"""Evaluators of a transfer function F on a matrix: their contract, series and direct sums. `cubics` has the tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from basisadapt.phi.bank import Transfer
from basisadapt.phi.series import Packed

BEYOND = 1 + 1e-4  # the largest |z| / R, which rounding may raise above 1


class Evaluator(ABC):
    """F on a matrix, and its pullback.

    - `parameters`: the tensors to which gradients flow.

    An evaluator made for [−R, R] gives NaN outside, so that one that is older than the factors cannot go unnoticed.
    """

    parameters: tuple[Tensor, ...]

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers held per element."""

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Scratch memory for up to `count` elements, in the dtype and on the device of `like`: `room` below."""
        return like.new_empty(0)

    @abstractmethod
    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z), in the shape of z."""

    @abstractmethod
    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and sums for `gradients`, which add up over the pieces of a matrix."""

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of Σ gradient · F(z) to the parameters, from the sums of `pullback`."""
        return sums


class Series(Evaluator):
    """The series of one module, from a compiled batch.

    - `coefficients`: shape (P + POWER_COUNT,), float64, with gradients: those of T_d(z / R), of which the first D are
      used, then those of powers (see `series.with_powers`). A gradient may reach either.
    - `packed`: shape (SIZE,), the same numbers and R in the dtype of the arithmetic, in the layout of `series.Packed`,
      on the device of the weights. D is read from it only if this evaluator itself does the work.
    - `expected` (int): the likely D, known without waiting for a GPU.
    """

    def __init__(self, coefficients: Tensor, packed: Tensor, expected: int) -> None:
        self.parameters = (coefficients,)
        self.packed, self.expected = packed, expected
        self._known_width: int | None = None
        self._signed: Tensor | None = None

    @property
    def width(self) -> int:
        """D, the number of terms."""
        if self._known_width is None:
            self._known_width = int(self.packed[Packed.DEGREE])
        return self._known_width

    def _rows(self) -> Tensor:
        """The coefficients of F and F' with respect to `_polynomials`, shape (2, D)."""
        if self._signed is None:
            rows = [self.packed[start : start + self.width] for start in (Packed.VALUES, Packed.SLOPES)]
            self._signed = torch.stack(rows) * _signs(self.width, self.packed)
        return self._signed

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Memory for D polynomials: to allocate it for every piece would cost as much as to fill it."""
        room = like.new_empty(self.width, count)
        room[0] = 1
        return room

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        return (self._rows()[0] @ _polynomials(z, self.packed[Packed.SCALE], room)).view_as(z)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and the moments Σ gradient · T_d(z / R)."""
        polynomials = _polynomials(z, self.packed[Packed.SCALE], room)
        value, slope = (self._rows() @ polynomials).view(2, *z.shape)
        moments = (polynomials @ gradient.flatten()).double() * _signs(self.width, self.parameters[0])
        beyond = len(self.parameters[0]) - self.width
        return value, slope.mul_(gradient), (functional.pad(moments, (0, beyond)),)


def _polynomials(z: Tensor, scale: Tensor, room: Tensor) -> Tensor:
    """±T_0(t) .. ±T_{D−1}(t) at t = scale · z, |t| ≤ 1, with the signs of `_signs`; shape (D, n), in `room`.

    The signs + + − − + + − − … turn T_d = 2t T_{d−1} − T_{d−2} into one fused multiply-add into place.
    """
    polynomials = room[:, : z.numel()]
    row = polynomials.unbind()
    torch.mul(z.flatten(), scale, out=row[1])
    spoil_beyond(row[1])
    twice = 2 * row[1]
    for d in range(2, len(row)):
        torch.addcmul(row[d - 2], twice, row[d - 1], value=-1 if d % 2 == 0 else 1, out=row[d])
    return polynomials


def spoil_beyond(t: Tensor, bound: Tensor | float = 1.0) -> None:
    """Replace every t outside ±bound by NaN, in place."""
    bound = bound * BEYOND
    # On a CPU one pass of reads usually finds none; elsewhere the host would have to wait.
    if t.device.type == "cpu":
        least, most = torch.aminmax(t)
        if bool((least >= -bound) & (most <= bound)):
            return
    t.masked_fill_(~(t.abs() <= bound), float("nan"))


def _signs(degree: int, like: Tensor) -> Tensor:
    return like.new_tensor([1.0 if d % 4 < 2 else -1.0 for d in range(degree)])


class Direct(Evaluator):
    """F from its N basis functions, in float64: the reference that every faster evaluator is tested against."""

    def __init__(self, transfer: Transfer) -> None:
        self.parameters = transfer.parameters
        self._transfer = transfer.with_parameters(*(p.detach().double() for p in transfer.parameters))

    @property
    def width(self) -> int:
        """Eight for each function: float64 is twice as wide."""
        return 8 * len(self._transfer.alpha)

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        return self._transfer(z.double()).to(z.dtype)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and the gradients to α, ω and the grid, by autograd over this piece alone."""
        with torch.enable_grad():
            inputs = [t.detach().double().requires_grad_() for t in (z, *self._transfer.parameters)]
            value = self._transfer.with_parameters(*inputs[1:])(inputs[0])
            slope, *rest = torch.autograd.grad(value, inputs, gradient.double(), allow_unused=True)
        grads = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(rest, inputs[1:], strict=True))
        slope = torch.zeros_like(z) if slope is None else slope.to(z.dtype)
        return value.detach().to(z.dtype), slope, grads


@dataclass(frozen=True)
class Split:
    """Two evaluators of one function: `apart` for the `rows` of BA that are far larger, and `main` for all others."""

    rows: Tensor
    main: Evaluator
    apart: Evaluator

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters of both evaluators."""
        return self.main.parameters + self.apart.parameters
