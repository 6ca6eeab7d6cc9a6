"""The ways to evaluate a transfer function F on a matrix, and to pull a gradient back through it: the contract, series
and direct sums. Tables are in `cubics`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from basisadapt.phi import series
from basisadapt.phi.bank import Transfer

BEYOND = 1 + 1e-4  # R: what rounding may add to |z|, and not more


class Evaluator(ABC):
    """F on a matrix, and its pullback. `parameters` are the tensors that gradients flow to.

    What is made for ±R gives NaN beyond it, and is not continued: a function that is older than the factors is seen.
    """

    parameters: tuple[Tensor, ...]
    width: int  # numbers held per element

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room to work in for up to `count` elements, to be passed to the methods below."""
        return like.new_empty(0)

    @abstractmethod
    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z), shape of z."""

    @abstractmethod
    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and sums over the elements from which `gradients` follow; they add up over pieces."""

    def gradients(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of Σ gradient · F(z) to the parameters."""
        return sums


class Series(Evaluator):
    """One module's series of a compiled batch.

    coefficients: (P + POWER_COUNT,), float64, with gradients: those of T_d(z / R), of which the first D are used, and
    behind them those of powers (see `series.with_powers`); a gradient may come to either. packed: (PACKED,), the same
    in the dtype of the arithmetic, and what belongs to it, in the layout of `series.pack`; on the device of the
    weights, from where D is read only if this evaluator itself does the work. expected: what D is likely to be, known
    without asking a GPU.
    """

    def __init__(self, coefficients: Tensor, packed: Tensor, expected: int) -> None:
        self.parameters = (coefficients,)
        self.packed, self.expected = packed, expected
        self._known_width: int | None = None
        self._signed: Tensor | None = None

    @property
    def width(self) -> int:  # type: ignore[override]
        """D."""
        if self._known_width is None:
            self._known_width = int(self.packed[0])
        return self._known_width

    def _rows(self) -> Tensor:
        """The coefficients of F and F' against `_polynomials`, shape (2, D)."""
        if self._signed is None:
            rows = [self.packed[start : start + self.width] for start in (series.VALUES, series.SLOPES)]
            self._signed = torch.stack(rows) * _signs(self.width, self.packed)
        return self._signed

    def scratch(self, count: int, like: Tensor) -> Tensor:
        """Room for D polynomials: making it anew for every piece would cost as much as filling it."""
        room = like.new_empty(self.width, count)
        room[0] = 1
        return room

    def value(self, z: Tensor, room: Tensor) -> Tensor:
        """F(z)."""
        return (self._rows()[0] @ _polynomials(z, self.packed[1], room)).view_as(z)

    def pullback(self, z: Tensor, gradient: Tensor, room: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """F(z), gradient · F'(z), and the moments of the gradient."""
        polynomials = _polynomials(z, self.packed[1], room)
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
    """Make NaN of every t that is not on ±bound, in place."""
    bound = bound * BEYOND
    # On a CPU one reading pass tells that there is none, as a rule; elsewhere the host does not ask.
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
        self.width = 8 * len(transfer.alpha)  # float64 is twice as wide
        self._transfer = transfer.with_parameters(*(p.detach().double() for p in transfer.parameters))

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
    """Two evaluators of one function: `apart` for these rows of BA, which tower over the others, `main` for those."""

    rows: Tensor
    main: Evaluator
    apart: Evaluator

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Those of both."""
        return self.main.parameters + self.apart.parameters
