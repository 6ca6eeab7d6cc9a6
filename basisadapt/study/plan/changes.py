"""What the command line changes in a study: `--set key=value`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from basisadapt.core.errors import InputError, shown
from basisadapt.core.synonyms import meant
from basisadapt.study.plan.keys import axis_key, full_key, types_of
from basisadapt.study.plan.spec import RULE, SWEEP, TUNE
from basisadapt.study.plan.yaml_text import parse_yaml

OPTIONS = {  # what could be a setting, and is an option of the command line
    **dict.fromkeys(("seed", "seeds", "random_seed"), "--seeds"),
    **dict.fromkeys(("workers", "num_workers", "n_jobs"), "--workers"),
    **dict.fromkeys(("output", "output_dir"), "--output"),
    "data_dir": "--data-dir",
    "trials": "--trials",
}


@dataclass(frozen=True)
class Changes:
    """The changes, by kind.

    overrides: full key to a value that replaces the base's.
    sweep: axis to the values that replace those of the study.
    tune: tuned setting, or name in RULE, to what replaces it in the study's `tune`.
    lists: full key to text with commas, for overrides that may be meant as an axis.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)


def setting_meant(name: str) -> str | None:
    """The full key of the setting of that name, here or elsewhere (`core.synonyms`); None if there is none."""
    try:
        return full_key(name)
    except InputError:
        return meant(name)


def split_changes(changes: Sequence[str]) -> Changes:
    """The changes "key=value", by kind. Raises InputError."""
    split = Changes()
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set needs key=value, got {shown(change)}")
        kind = next((kind for kind in (SWEEP, TUNE) if key.startswith(kind)), "")
        name = key.removeprefix(kind)
        if kind == TUNE and name in RULE:
            split.tune[name] = parse_yaml(text, f"--set {key}")
        elif kind:
            parts = [part for part in text.split(",") if part.strip()]
            if not parts:
                raise InputError(f"--set {key} needs at least one value")
            axes = split.sweep if kind == SWEEP else split.tune
            axis = _known(axis_key, name)
            axes[name] = [_parse(key, axis, part.strip()) for part in parts]
        else:
            setting = _known(full_key, key)
            split.overrides[setting] = _parse(key, setting, text)
            if "," in text and not text.startswith(("[", "{")):
                split.lists[setting] = text
    return split


def _known(find: Callable[[str], str], name: str) -> str:
    """The key that `find` finds for the name. Raises its InputError, or one that tells of the option of that name."""
    try:
        return find(name)
    except InputError as error:
        if name in OPTIONS:
            raise InputError(f"unknown key {name!r}; it is the option {OPTIONS[name]}") from error
        raise


def _parse(option: str, key: str, text: str) -> Any:
    """The value of a setting from its text. A setting that takes only text keeps it as typed, even if it is valid YAML.

    Where a setting takes text or something else, text is whatever does not parse as the other.
    """
    types = types_of(key)
    if types <= {str, NoneType}:
        return None if NoneType in types and text in ("null", "~", "") else text
    try:
        value = parse_yaml(text, f"--set {option}")
    except InputError:
        if str not in types:
            raise
        return text
    return text if isinstance(value, str) else value


@contextmanager
def hint_at_axes(lists: Mapping[str, str]) -> Iterator[None]:
    """Add to the refusal of a value with commas how to make each of its parts a row. lists: see `Changes`."""
    try:
        yield
    except InputError as error:
        for key, text in lists.items():
            if repr(text) in str(error):
                axis = f"{SWEEP}{key.removeprefix('adapter.')}"
                raise InputError(f"{error}; for a row of each value: --set {axis}={text}") from error
        raise
