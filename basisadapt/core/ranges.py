"""Search spaces: the range or the choices that a plug-in or a study declares for a setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from basisadapt.core.errors import InputError, refusing, shown


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included. Whether they are integers follows from the setting's type.

    - `low` (float): the smallest.
    - `high` (float): the largest, above `low`.
    - `log` (bool, default False): sample evenly in the logarithm; `low` is then above 0.

    Raises InputError unless low < high, and 0 < low if `log`.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        sound = -math.inf < self.low < self.high < math.inf and not (self.log and self.low <= 0)
        if not sound:
            expected = "0 < low < high" if self.log else "low < high"
            raise InputError(f"a range needs {expected}, got {self.low!r} to {self.high!r}")

    def __or__(self, other: Range) -> Range:
        """The smallest range that contains both; logarithmic if both are."""
        return Range(min(self.low, other.low), max(self.high, other.high), self.log and other.log)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', by its logarithm' if self.log else ''}"


Choices = tuple[Any, ...]


def parse_range(values: Any, key: str) -> Range | Choices:
    """[low, high] or [low, high, "log"] as a Range, any other list as choices. Raises InputError naming `key`.

    A list of two numbers is always a range.
    """
    if not isinstance(values, list) or not values:
        raise InputError(
            f"search.{key} must be [low, high], [low, high, log] or a list of choices, got {shown(values)}"
        )
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == 2 and values[2:] in ([], ["log"]) and numbers == values[:2]:
        with refusing(f"search.{key}", InputError):
            return Range(numbers[0], numbers[1], log=len(values) == 3)
    return tuple(values)
