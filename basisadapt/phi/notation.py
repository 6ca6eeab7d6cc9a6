"""Settings that are small languages, each parsed into what it means: a number, or a word with numbers behind colons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from basisadapt.core.errors import refused

LARGEST = 1e6  # beyond, a setting is a slip of the pen, and would be numbers that float32 has not
MODERATE = "above 0, from 1e-6 to 1e6"

Value = float | str | None  # of a setting; None is never valid, and no preset leaves it


def moderate(*values: float) -> bool:
    """Whether all lie from 1e-6 to 1e6."""
    return all(1 / LARGEST <= value <= LARGEST for value in values)


@dataclass(frozen=True)
class Bandwidth:
    """ω₀ by the depth of a block: from `first` to `last`, linearly."""

    first: float
    last: float
    by_depth: bool = False

    @staticmethod
    def parse(value: Value, nyquist: float) -> Bandwidth:
        """A number, "nyquist" for the one that is given, or "depth:LOW:HIGH". Raises InputError."""
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
        """ω₀ at a depth from 0, the first block, to 1, the last."""
        return self.first + (self.last - self.first) * depth


@dataclass(frozen=True)
class Gain:
    """g: "fixed" at a number, "learned" from there on, or "normalised", the number over the root mean square of BA."""

    kind: str
    number: float

    @staticmethod
    def parse(value: Value) -> Gain:
        """A number, "learned:G" or "normalised:G". Raises InputError."""
        match _words(value):
            case None, (gain,) if moderate(gain):
                return Gain("fixed", gain)
            case ("learned" | "normalised") as kind, (gain,) if moderate(gain):
                return Gain(kind, gain)
        raise refused("gain", value, f'{MODERATE}, or "learned:G" or "normalised:G" with such a G')


@dataclass(frozen=True)
class Rate:
    """A learning rate: a ratio to the base rate, or absolute."""

    number: float
    absolute: bool = False

    @staticmethod
    def parse(value: Value) -> Rate:
        """A number for a ratio, or "absolute:RATE". Raises InputError."""
        match _words(value):
            case (None | "absolute") as word, (rate,) if 0 <= rate < math.inf:
                return Rate(rate, absolute=word is not None)
        raise refused("transfer_lr", value, 'at least 0, or "absolute:RATE" with such a rate')

    def beside(self, base: float) -> float:
        """The rate beside the base rate."""
        return self.number if self.absolute else base * self.number


@dataclass(frozen=True)
class Amplitudes:
    """How α starts: "zero", "identity", "fan_in", or "normal" with standard deviation sigma."""

    kind: str
    sigma: float = 0.0

    @staticmethod
    def parse(value: Value) -> Amplitudes:
        """One of the words, or "normal:SIGMA". Raises InputError."""
        match _words(value):
            case ("zero" | "identity" | "fan_in") as kind, ():
                return Amplitudes(kind)
            case "normal", (sigma,) if 0 <= sigma <= LARGEST:
                return Amplitudes("normal", sigma)
        raise refused("amplitude_init", value, '"zero", "identity", "normal:SIGMA" or "fan_in"')


def _words(value: Value) -> tuple[str | None, tuple[float, ...]]:
    """A word and its numbers: "depth", (1, 4) of "depth:1:4"; None, (4,) of 4; the text itself where it has none."""
    if not isinstance(value, str):
        return None, () if value is None else (value,)
    word, *numbers = value.split(":")
    try:
        return word, tuple(map(float, numbers))
    except ValueError:
        return value, ()
