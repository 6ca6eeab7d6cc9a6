"""The space of a search: its settings and the range of each."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import Trial

from basisadapt.core.errors import InputError
from basisadapt.core.ranges import Choices, Range, parse_range
from basisadapt.study.plan.keys import full_key, types_of
from basisadapt.study.plan.spec import StudySpec

if TYPE_CHECKING:
    from basisadapt.core.registry import Registry
    from basisadapt.training.config import RunConfig

DECLARED = {  # default ranges; the study's, then those of the plug-ins that a trial may use, come first
    "train.lr": Range(1e-4, 3e-2, log=True),
    "adapter.num_basis": Range(8, 128, log=True),
    "adapter.interval": Range(1.0, 10.0, log=True),
    "adapter.omega_init": Range(0.3, 10.0, log=True),
    "adapter.gain": Range(1.0, 300.0, log=True),
    "adapter.transfer_lr": Range(0.01, 10.0, log=True),
    "adapter.transfer_decay": Range(1e-3, 1.0, log=True),
}

Space = Mapping[str, Range | Choices]


def search_space(spec: StudySpec, axes: Mapping[str, Iterable[Any]], base: RunConfig) -> Space:
    """Full key to range or choices, in a fixed order.

    axes: the sweep.
    base: the configuration that the trials share.

    If the study has `search`, the space is the settings there: [low, high], [low, high, log], a list of choices, or
    `declared` for the range of the plug-ins or of DECLARED. Otherwise it is the axes with their values, and every
    setting with a declared range. Raises InputError.
    """
    stated = {full_key(name): values for name, values in spec.search.items()}
    chosen: dict[str, Range | Choices | None] = {full_key(axis): tuple(points) for axis, points in axes.items()}
    if stated:
        chosen = {key: None if values == "declared" else parse_range(values, key) for key, values in stated.items()}
    plugins = _plugins(base, chosen)
    if not stated:
        spoken = [f"adapter.{name}" for kind in plugins for plugin in kind for name in plugin.search]
        known = set(base.to_mapping()["adapter"])
        declared = [key for key in (*DECLARED, *spoken) if not key.startswith("adapter.") or key[8:] in known]
        chosen.update({full_key(key): None for key in declared if key not in chosen})
    return {key: where if where is not None else _declared(key, plugins) for key, where in chosen.items()}


def suggest(trial: Trial, key: str, where: Range | Choices) -> None:
    """Have Optuna choose a setting of a trial; an integer if the setting takes only integers."""
    if not isinstance(where, Range):
        trial.suggest_categorical(key, where)
    elif _is_whole(key):
        trial.suggest_int(key, round(where.low), round(where.high), log=where.log)
    else:
        trial.suggest_float(key, where.low, where.high, log=where.log)


def edges(space: Space) -> list[dict[str, Any]]:
    """Single settings to check before a search starts: the ends of each range, and each choice."""
    found: list[dict[str, Any]] = []
    for key, where in space.items():
        ends = [where.low, where.high] if isinstance(where, Range) else list(where)
        found += [{key: round(end) if isinstance(where, Range) and _is_whole(key) else end} for end in ends]
    return found


def _plugins(base: RunConfig, chosen: Mapping[str, Range | Choices | None]) -> list[list[Any]]:
    """The classes of bases, grids and sharing policies that a trial may use, by kind."""
    from basisadapt.phi.basis import BASES
    from basisadapt.phi.grids import GRIDS
    from basisadapt.phi.sharing import SHARING

    kinds = []
    registries: dict[str, Registry[Any]] = {"basis": BASES, "grid": GRIDS, "sharing": SHARING}
    for name, registry in registries.items():
        where = chosen.get(f"adapter.{name}") or (getattr(base.adapter, name, None),)
        names = [] if isinstance(where, Range) else [choice for choice in where if choice is not None]
        kinds.append([registry[choice] for choice in names])
    return kinds


def _declared(key: str, plugins: Iterable[Iterable[Any]]) -> Range:
    """The union of the ranges that the plug-ins declare; a plug-in without one counts with the default range."""
    name = key.removeprefix("adapter.")
    general = DECLARED.get(key)
    spoken: list[Range | None] = [
        plugin.search.get(name, general)
        for kind in plugins
        if any(name in plugin.search for plugin in kind)
        for plugin in kind
    ]
    known = [where for where in spoken or [general] if where is not None]
    if not known:
        raise InputError(f"search.{key}: no range is declared for it; give one, as [low, high]")
    return functools.reduce(operator.or_, known)


def _is_whole(key: str) -> bool:
    """Whether a setting takes only integers."""
    types = types_of(key)
    return int in types and float not in types
