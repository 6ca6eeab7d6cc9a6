"""Builds settings dataclasses from plain mappings (YAML, JSON, the command line), checking every key and type."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from basisadapt.core.errors import InputError, refused, shown, unknown
from basisadapt.core.synonyms import meant

S = TypeVar("S")

ALIKE = 0.6  # of a key that is misspelled, see `errors.nearest`
LARGEST = int(sys.float_info.max)
WHOLE = 2**63  # whole numbers lie below, as the files and databases that keep them require


def from_mapping(cls: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Build the dataclass `cls` from `values`.

    `where` is the dotted prefix of the keys in messages, such as "train". Integers may be given as whole floats,
    booleans as 0 or 1, and floats as integers; nothing else is converted. The dataclass itself checks ranges.

    Raises InputError for an unknown or missing key, a value of the wrong type, or what the dataclass refuses.
    """
    assert dataclasses.is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise refused(where or cls.__name__.strip("_"), values, "keys and values")
    names = field_names(cls)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in names:
            raise unknown_key(f"{prefix}{key}", [prefix + name for name in names])
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"key {prefix + field.name!r} is missing")
    return cls(**checked(cls, values, where))


def field_names(cls: type) -> tuple[str, ...]:
    """The names of the fields that a settings dataclass is made from, in order."""
    return _field_names(cls)


@functools.cache
def _field_names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls) if field.init)


def unknown_key(key: str, known: Iterable[str]) -> InputError:
    """The error for a setting's key that is not among the `known` ones, with what others call so, or the nearest."""
    return unknown("key", key, known, alike=ALIKE, meant=meant(key))


def late(default: Any) -> Any:
    """A field for a setting that was added when records already existed; see `without_late`."""
    return dataclasses.field(default=default, metadata={"late": True})


def without_late(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those late settings of `cls` that are at their defaults.

    So a configuration has the same identity as one recorded before the setting existed.
    """
    late = _late(cls)
    return {key: value for key, value in values.items() if key not in late or value != late[key]}


@functools.cache
def _late(cls: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls) if field.metadata.get("late")}


def seed() -> Any:
    """A field for a seed (int or None, default None: the run's seed, see `with_seed`)."""
    return dataclasses.field(default=None, metadata={"seed": True})


def with_seed(settings: S, run_seed: int) -> S:
    """`settings` with `run_seed` for every seed field that is None."""
    assert dataclasses.is_dataclass(settings) and not isinstance(settings, type)
    seeds = [field.name for field in dataclasses.fields(settings) if field.metadata.get("seed")]
    return dataclasses.replace(settings, **{name: run_seed for name in seeds if getattr(settings, name) is None})


def checked(cls: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`values` of fields of the dataclass `cls`, each converted to its field's type (see `from_mapping`).

    Raises InputError for a value of another type.
    """
    hints, prefix = _hints(cls), f"{where}." if where else ""
    return {key: _checked(value, hints[key], prefix + key) for key, value in values.items()}


def is_object(text: str | bytes) -> bool:
    """Whether a text is a whole JSON object, and not the beginning of one."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(value: Any, hint: Any, key: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        matched, result = _matched(value, option)
        if matched:
            return result
    expected = " or ".join(_describe(option) for option in options)
    raise InputError(f"{key} must be {expected}, got {shown(value)}")


def _matched(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` fits the type `hint`, and the value converted to it."""
    if hint is Any:
        return True, value
    if hint is types.NoneType:
        return value is None, None
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)), bool(value)
    if hint is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (True, int(value)) if whole and not isinstance(value, bool) and abs(value) < WHOLE else (False, None)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        small = isinstance(value, float) or (number and abs(value) < LARGEST)
        return (True, float(value)) if number and small else (False, None)
    if hint is str:
        return isinstance(value, str), value
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, None
        inner = typing.get_args(hint)
        inners = inner if origin is tuple and ... not in inner else [inner[0]] * len(value)
        items = [_matched(item, one) for item, one in zip(value, inners, strict=False)]
        fits = len(inners) == len(value) and all(ok for ok, _ in items)
        return fits, origin(item for _, item in items)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast(type, hint)), value
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return False, None
        key_hint, value_hint = typing.get_args(hint)
        pairs = [(_matched(key, key_hint), _matched(item, value_hint)) for key, item in value.items()]
        return all(key[0] and item[0] for key, item in pairs), {key[1]: item[1] for key, item in pairs if key[0]}
    raise TypeError(f"settings of type {hint} are not supported")


def _describe(hint: Any) -> str:
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    if hint in plain:
        return plain[hint]
    if typing.get_origin(hint) in (list, tuple):
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) in (dict, Mapping):
        value = typing.get_args(hint)[1]
        return "keys and values" if value is Any else f"keys and values, each value {_describe(value)}"
    return str(getattr(hint, "__name__", hint))
