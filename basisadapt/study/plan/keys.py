"""The keys of settings, such as `adapter.r` or `r` for short; the types of their values, and values as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from types import UnionType
from typing import Any, get_args, get_type_hints

from basisadapt.core.settings import field_names, unknown_key
from basisadapt.study.plan.spec import VARIANT


def known_keys() -> tuple[str, ...]:
    """The full key of every setting."""
    from basisadapt.methods import METHODS

    return _keys_with(tuple(METHODS[name].settings for name in METHODS))


@lru_cache(maxsize=2)
def _keys_with(settings: tuple[type, ...]) -> tuple[str, ...]:
    """known_keys() while methods have these settings. Cached, since a large study asks tens of thousands of times."""
    from basisadapt.tasks import DataSettings
    from basisadapt.training.config import TrainSettings, adapter_keys

    groups = {"adapter": adapter_keys(), "train": field_names(TrainSettings), "data": field_names(DataSettings)}
    return ("task", "backbone", "method", *(f"{group}.{name}" for group, names in groups.items() for name in names))


def full_key(name: str) -> str:
    """The full key of `name`, which may omit "adapter.". Raises InputError if there is no such setting."""
    known = known_keys()
    if f"adapter.{name}" in known:
        return f"adapter.{name}"
    if name not in known:
        raise unknown_key(name, known)
    return name


def axis_key(name: str) -> str:
    """The full name of an axis: VARIANT, or the full key of a setting. Raises InputError for neither."""
    return name if name == VARIANT else full_key(name)


def with_full_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by full keys. Raises InputError for an unknown key."""
    return {full_key(name): value for name, value in values.items()}


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"adapter": {"r": 4}} as {"adapter.r": 4}. Raises InputError for an unknown key."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat.update(with_full_keys(inner))
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"adapter.r": 4} as {"adapter": {"r": 4}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group, dot, key = name.partition(".")
        if dot:
            nested.setdefault(group, {})[key] = value
        else:
            nested[name] = value
    return nested


def types_of(key: str) -> set[Any]:
    """The types that the values of a full key, or of the axis VARIANT, may have; for the adapter, of all methods."""
    from basisadapt.methods import METHODS
    from basisadapt.tasks import DataSettings
    from basisadapt.training.config import RunConfig, TrainSettings

    if key == VARIANT:
        return {str}
    group, _, name = key.rpartition(".")
    one = {"": RunConfig, "train": TrainSettings, "data": DataSettings}
    classes: list[type] = [one[group]] if group in one else [METHODS[method].settings for method in METHODS]
    hints = [found[name] for cls in classes if name in (found := get_type_hints(cls))]
    return {part for hint in hints for part in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}


def plain(value: Any) -> str:
    """A value as the command line takes it: true, 0.5, sinc."""
    return value if isinstance(value, str) else json.dumps(value)
