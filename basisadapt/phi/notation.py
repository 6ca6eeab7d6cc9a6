"""Parsers of settings such as "depth:1:4": a number, or a word followed by numbers after colons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from basisadapt.core.errors import refused

LARGEST = 1e6  # larger values are typing errors, and would lead to numbers beyond the range of float32
MODERATE = "above 0, from 1e-6 to 1e6"

Value = float | str | None  # of a setting; None is invalid, and every preset replaces it


def moderate(*values: float) -> bool:
    """Whether all values lie in [1e-6, 1e6]."""
    return all(1 / LARGEST <= value <= LARGEST for value in values)


@dataclass(frozen=True)
class Bandwidth:
    """ω₀ of a block, linear in its depth.

    - `first` (float): ω₀ in the first block.
    - `last` (float): ω₀ in the last block.
    - `by_depth` (bool, default False): ω₀ depends on the depth, which must then be known.
    """

    first: float
    last: float
    by_depth: bool = False

    @staticmethod
    def parse(value: Value, nyquist: float) -> Bandwidth:
        """Parse a number, "nyquist" (the number `nyquist`) or "depth:LOW:HIGH". Raises InputError for anything else."""
        match _words(value):
            case None, (omega,) if moderate(omega):
                return Bandwidth(omega, omega)
            case "nyquist", () if moderate(nyquist):
                return Bandwidth(nyquist, nyquist)
            case "depth", (first, last) if moderate(first, last):
                return Bandwidth(first, last, by_depth=True)
        known = f'{MODERATE}, "nyquist" with num_basis > 1, or "depth:LOW:HIGH" with both above 0'
        raise refused("omega_init", value, known)

    def at(self, depth: float) -> float:
        """ω₀ at a depth between 0, the first block, and 1, the last."""
        return self.first + (self.last - self.first) * depth


@dataclass(frozen=True)
class Gain:
    """The gain g.

    - `kind` (str): "fixed" at the number, "learned" starting there, or "normalised": the number over the root mean
      square of BA.
    - `number` (float in [1e-6, 1e6]): see `kind`.
    """

    kind: str
    number: float

    @staticmethod
    def parse(value: Value) -> Gain:
        """Parse a number, "learned:G" or "normalised:G". Raises InputError for anything else."""
        match _words(value):
            case None, (gain,) if moderate(gain):
                return Gain("fixed", gain)
            case ("learned" | "normalised") as kind, (gain,) if moderate(gain):
                return Gain(kind, gain)
        raise refused("gain", value, f'{MODERATE}, or "learned:G" or "normalised:G" with such a G')


@dataclass(frozen=True)
class Rate:
    """A learning rate of φ.

    - `number` (float ≥ 0): a ratio to the base rate, or the rate itself.
    - `absolute` (bool, default False): it is the rate itself.
    """

    number: float
    absolute: bool = False

    @staticmethod
    def parse(value: Value) -> Rate:
        """Parse a number, for a ratio, or "absolute:RATE". Raises InputError for anything else."""
        match _words(value):
            case (None | "absolute") as word, (rate,) if 0 <= rate < math.inf:
                return Rate(rate, absolute=word is not None)
        raise refused("transfer_lr", value, 'at least 0, or "absolute:RATE" with such a rate')

    def beside(self, base: float) -> float:
        """The learning rate, given the base rate."""
        return self.number if self.absolute else base * self.number


@dataclass(frozen=True)
class Amplitudes:
    """The start of α.

    - `kind` (str): "zero", "identity", "fan_in" or "normal".
    - `sigma` (float ≥ 0, default 0): the standard deviation of "normal".
    """

    kind: str
    sigma: float = 0.0

    @staticmethod
    def parse(value: Value) -> Amplitudes:
        """Parse "zero", "identity", "fan_in" or "normal:SIGMA". Raises InputError for anything else."""
        match _words(value):
            case ("zero" | "identity" | "fan_in") as kind, ():
                return Amplitudes(kind)
            case "normal", (sigma,) if 0 <= sigma <= LARGEST:
                return Amplitudes("normal", sigma)
        raise refused("amplitude_init", value, '"zero", "identity", "normal:SIGMA" or "fan_in"')


def _words(value: Value) -> tuple[str | None, tuple[float, ...]]:
    """A word and its numbers: "depth:1:4" gives "depth", (1, 4); 4 gives None, (4,); other texts stay whole."""
    if not isinstance(value, str):
        return None, () if value is None else (value,)
    word, *numbers = value.split(":")
    try:
        return word, tuple(map(float, numbers))
    except ValueError:
        return value, ()
