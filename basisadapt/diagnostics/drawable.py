"""What can be drawn of a result that comes from elsewhere, looked at without drawing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

LARGEST = 1e100  # size of a number that axes take


def check_drawable(result: Mapping[str, Any]) -> None:
    """Raise ValueError unless modules, φ, snapshots and landscape of a result have the form that `figures` draws.

    result: a mapping with the fields of `training.RunResult`, whose curves and metrics are numbers.
    """
    modules = result["modules"]
    for name, numbers in modules.items():
        _need(isinstance(numbers.get("kind"), str), f"modules.{name}.kind", "a text")
        _need(_is_number(numbers.get("stable_rank")), f"modules.{name}.stable_rank", "a number")
        _need(_are_numbers(numbers.get("spectrum", ())), f"modules.{name}.spectrum", "numbers")
    _check_phi(result["phi"], "phi")
    for number, snapshot in enumerate(result["snapshots"]):
        where = f"snapshots[{number}]"
        _need(type(snapshot.get("step")) is int, f"{where}.step", "a whole number")
        ranks = _mapping(snapshot.get("stable_rank"), f"{where}.stable_rank")
        _need(all(_is_number(ranks.get(name)) for name in modules), f"{where}.stable_rank", "a number of every module")
        _check_phi(_mapping(snapshot.get("phi"), f"{where}.phi"), f"{where}.phi")
    if landscape := result["landscape"]:
        axis, loss = landscape.get("axis"), landscape.get("loss")
        square = isinstance(axis, list) and isinstance(loss, list) and {len(axis)} == {len(loss), *map(_length, loss)}
        _need(square and len(axis) > 1 and _are_numbers(axis), "landscape", "an axis, and a loss for each two of it")
        _need(all(_are_numbers(v for v in row if v is not None) for row in loss), "landscape.loss", "numbers")


def _check_phi(curves: Mapping[str, Any], where: str) -> None:
    for name, curve in curves.items():
        lines = [_mapping(curve, f"{where}.{name}").get(key) for key in ("z", "phi")]
        same = _length(lines[0]) == _length(lines[1])
        _need(same and all(map(_are_numbers, lines)), f"{where}.{name}", "as many numbers z as phi")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    _need(isinstance(value, Mapping), where, "keys and values")
    return cast(Mapping[str, Any], value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else -1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) >= LARGEST


def _are_numbers(values: Any) -> bool:
    return not isinstance(values, str | Mapping | None) and all(map(_is_number, values))


def _need(holds: bool, where: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{where} must be {expected}")
