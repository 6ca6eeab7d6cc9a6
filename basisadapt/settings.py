"""Plain mappings (YAML, JSON, the command line) to settings dataclasses, checked key by key and type by type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from basisadapt.errors import InputError, unknown

S = TypeVar("S")


def from_mapping(cls: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Build the dataclass `cls` from `values`.

    `where` is the dotted place that messages name, such as "train". Numbers given as whole floats or as 0/1 are taken
    for integers and booleans; nothing else is converted. Raises InputError for an unknown key, or a value of the
    wrong type; the dataclass itself checks ranges.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in names:
            raise unknown("key", f"{prefix}{key}", [prefix + name for name in names])
    checked = {key: _checked(value, hints[key], prefix + key) for key, value in values.items()}
    return cls(**checked)


def _checked(value: Any, hint: Any, key: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        matched, result = _matched(value, option)
        if matched:
            return result
    expected = " or ".join(_describe(option) for option in options)
    raise InputError(f"{key} must be {expected}, got {value!r}")


def _matched(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` fits one plain type, and the value in that type."""
    if hint is Any:
        return True, value
    if hint is types.NoneType:
        return value is None, None
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)), bool(value)
    if hint is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (True, int(value)) if whole and not isinstance(value, bool) else (False, None)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (True, float(value)) if number else (False, None)
    if hint is str:
        return isinstance(value, str), value
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        inner = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            return False, None
        items = [_matched(item, inner) for item in value]
        return all(ok for ok, _ in items), origin(item for _, item in items)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast(type, hint)), value
    if origin in (dict, Mapping):
        return isinstance(value, Mapping), value
    raise TypeError(f"settings of type {hint} are not supported")


def _describe(hint: Any) -> str:
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    if hint in plain:
        return plain[hint]
    if typing.get_origin(hint) in (list, tuple):
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return str(getattr(hint, "__name__", hint))
