"""The rows and cells of a study, after the changes of its preset and of the command line."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from basisadapt.core.errors import InputError, require, shown, unknown
from basisadapt.study.plan.changes import hint_at_axes, split_changes
from basisadapt.study.plan.keys import axis_key, flatten, full_key, nest, plain, with_full_keys
from basisadapt.study.plan.published import Name
from basisadapt.study.plan.shipped import list_studies
from basisadapt.study.plan.spec import SWEEP, TUNE, VARIANT, Factor, Reference, StudySpec, axes_in

if TYPE_CHECKING:  # run configurations need torch, which --help and --list must not wait for
    from basisadapt.training.config import RunConfig


Point = tuple[tuple[str, Any], ...]  # a value on every axis: (axis, value), ...


@dataclass(frozen=True)
class Row:
    """A row of the table: one configuration, run with every seed.

    cells: its cells, one per seed.
    point: its values on the axes; for a row of `StudySpec.beside`, its task alone.
    beside: its label there, or None for a row of the sweep.
    published: its name in `published_values`, or None.
    group: the values that it shares with its reference.
    is_reference: whether it is the reference of its group.
    """

    cells: tuple[Cell, ...]
    point: Point
    beside: str | None = None
    published: Name | None = None
    group: tuple[Any, ...] = ()
    is_reference: bool = False

    @property
    def task(self) -> str:
        """The task of its cells."""
        return self.cells[0].config.task

    @cached_property
    def label(self) -> str:
        """Its values on the axes, after the label of an extra row, joined by ", "."""
        return label_of(self.point, self.beside)

    @cached_property
    def name(self) -> str:
        """The label without the task; rows that differ in their task alone share it."""
        return label_of([(axis, value) for axis, value in self.point if axis != "task"], self.beside) or self.label

    def with_cells(self, **fields: Any) -> Row:
        """The row with other values in these fields of its cells."""
        return replace(self, cells=tuple(replace(cell, **fields) for cell in self.cells))


def label_of(point: Iterable[tuple[str, Any]], beside: str | None = None) -> str:
    """The label of a row at a point; `beside` is the label of an extra row."""
    return ", ".join([*([] if beside is None else [beside]), *(plain(value) for _, value in point)])


@dataclass(frozen=True)
class Cell:
    """One run of a study; `key` identifies it in every record.

    study: the name of the study.
    row: the label of its row.
    config: its configuration.
    named: the axes and the full keys that the study's rows or the command line set.
    point: its row's values on the axes.
    """

    study: str
    row: str
    config: RunConfig
    named: tuple[str, ...] = ()
    point: Point = ()

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.seed

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by full keys, such as `adapter.r`."""
        config = self.config.to_mapping()
        parts = {name: config.pop(name) for name in list(config) if isinstance(config[name], dict)}
        return {**config, **{f"{part}.{key}": v for part, values in parts.items() for key, v in values.items()}}

    @property
    def parameters(self) -> dict[str, Any]:
        """Its variant and settings among `named`; settings that its method lacks are left out."""
        known = {**{axis: value for axis, value in self.point if axis == VARIANT}, **self.settings}
        return {key: known[key] for key in self.named if key in known}

    @cached_property
    def key(self) -> str:
        """See `cell_key`."""
        return cell_key(self.study, self.config.to_mapping())


def cell_key(study: str, config: Mapping[str, Any]) -> str:
    """The SHA-256 of study, configuration and seed, 16 hexadecimal digits; without `late` settings at their default."""
    from basisadapt.training.config import identity

    settings = {name: value for name, value in identity(config).items() if name != "seed"}
    canonical = json.dumps({"study": study, "config": settings, "seed": config.get("seed")}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A spec and its rows, after all changes."""

    spec: StudySpec
    rows: tuple[Row, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, row by row."""
        return tuple(cell for row in self.rows for cell in row.cells)

    @property
    def in_turn(self) -> tuple[Cell, ...]:
        """Every cell in the order of running: seed by seed within a group, the reference first.

        So differences show early.
        """
        groups = {group: place for place, group in enumerate(dict.fromkeys(row.group for row in self.rows))}
        turns = [
            ((groups[row.group], place, not row.is_reference), cell)
            for row in self.rows
            for place, cell in enumerate(row.cells)
        ]
        return tuple(cell for _, cell in sorted(turns, key=lambda turn: turn[0]))


def resolve(
    spec: StudySpec, *, preset: str = "quick", changes: Sequence[str] = (), seeds: Sequence[int] | None = None
) -> Study:
    """The rows of `spec`. Precedence: base < given < preset < changes ("key=value") < axis value, or the row's `set`.

    Every configuration is checked. Tuned settings stay at the base's value. Raises InputError.
    """
    split = split_changes(changes)
    if preset not in spec.presets and preset != "quick":  # quick is the default, which a study need not name
        raise unknown("preset", preset, spec.presets)
    preset_values = dict(spec.presets.get(preset, {}))
    preset_seeds = preset_values.pop("seeds", None)
    seeds = _checked_seeds(seeds or preset_seeds or spec.seeds)

    preset_axes = axes_in(preset_values, SWEEP)
    preset_values = {name: value for name, value in preset_values.items() if not name.startswith((SWEEP, TUNE))}
    above = {**with_full_keys(preset_values), **split.overrides}
    sweep: dict[str, tuple[str, list[Any]]] = {}
    for name, points in (*spec.sweep.items(), *preset_axes.items(), *split.sweep.items()):
        sweep[axis_key(name)] = (name, points)
    _check_variants(spec, sweep)
    for name in spec.drawn_along:
        axis_key(name)  # raises for what is no axis; an axis that is not swept draws nothing

    given = (values for of_axis in spec.given.values() for values in of_axis.values())
    own = (name for values in (*given, *(beside.set for beside in spec.beside)) for name in values)
    named = tuple(dict.fromkeys([*sweep, *map(full_key, own), *split.overrides]))
    only_tasks = list(sweep) == ["task"] and not spec.sweep and bool(spec.beside)  # it multiplies the extra rows
    swept = [] if only_tasks or not sweep else product(sweep.values())
    tasks = sweep["task"][1] if "task" in sweep else [None]
    check_count((len(swept) + len(spec.beside) * len(tasks)) * len(seeds))
    layers = _Layers(flatten(spec.base), above)
    with hint_at_axes(split.lists):
        rows = [_swept_row(spec, layers, point, seeds) for point in swept]
        for beside in spec.beside:
            for point in [(("task", task),) for task in tasks] if "task" in sweep else [()]:
                base = _base(spec, layers, point)
                config = {**base, **_scaled(base, with_full_keys(beside.set)), **dict(point)}
                published = None if beside.published is None else (beside.published,)
                rows.append(_row(spec, Row((), point, beside.label, published), config, seeds))

    labels = [row.label for row in rows]
    for label, count in collections.Counter(labels).items():
        if count > 1:
            raise InputError(f"study {spec.name!r} has two rows called {label!r}")
    if not rows:
        raise InputError(f"study {spec.name!r} has no rows: give it a sweep or rows beside it")
    rows = [_with_group(row.with_cells(named=named, point=row.point), spec.reference, sweep) for row in rows]
    if spec.reference is not None and not any(row.is_reference for row in rows):
        raise unknown("reference row", str(spec.reference), labels)
    return Study(on_own_data(spec, rows), tuple(rows))


def on_own_data(spec: StudySpec, rows: Iterable[Row]) -> StudySpec:
    """The spec; a shipped one without published table and claims if a row uses the user's own data."""
    from basisadapt import tasks
    from basisadapt.tasks.own_data import OwnData

    configs = (row.cells[0].config for row in rows)
    data = dict.fromkeys((config.task, config.data) for config in configs)
    if spec.name not in list_studies() or not any(isinstance(tasks.find(*one), OwnData) for one in data):
        return spec
    return replace(spec, answers=None, claims=())


def parameter_values(spec: StudySpec, cells: Iterable[Cell]) -> dict[str, list[Any]]:
    """Parameter of the cells to its values: first those of the study's axes under all presets, then those of the cells.

    So a part of a study has the same choices as the whole.
    """
    found: dict[str, list[Any]] = {}
    for axes in (spec.sweep, *(axes_in(overrides, SWEEP) for overrides in spec.presets.values())):
        for name, values in axes.items():
            _add(found, axis_key(name), values)
    for cell in {cell.row: cell for cell in cells}.values():
        for key, value in cell.parameters.items():
            _add(found, key, [value])
    return found


def _add(found: dict[str, list[Any]], key: str, values: Iterable[Any]) -> None:
    known = found.setdefault(key, [])
    known.extend(value for value in values if value not in known)


def _with_group(row: Row, reference: Reference | None, axes: Iterable[str]) -> Row:
    """The row with its group. axes: by their full names."""
    if reference is None or reference.axis is None:
        is_called = reference is not None and reference.value in (row.name, row.label)
        return replace(row, group=(row.task,), is_reference=is_called)
    axis = axis_key(reference.axis)
    flat = {**row.cells[0].settings, **{name: value for name, value in row.point if name == VARIANT}}
    others = dict.fromkeys(["task", *axes])
    others.pop(axis, None)
    return replace(
        row,
        group=tuple(flat.get(key) for key in others),
        is_reference=axis in axes and plain(flat.get(axis)) == reference.value,
    )


MAX_CELLS = 10_000  # of one study


def product(axes: Iterable[tuple[str, list[Any]]]) -> list[Point]:
    """Every combination of the axes' values; one empty point for no axes. Raises InputError for more than MAX_CELLS."""
    axes = list(axes)
    check_count(math.prod(len(points) for _, points in axes))
    return list(itertools.product(*([(name, value) for value in points] for name, points in axes)))


def check_count(count: int) -> None:
    """Raise InputError for more than MAX_CELLS cells, which would take hours even to list."""
    if count > MAX_CELLS:
        raise InputError(f"a study may have at most {MAX_CELLS:,} cells, and its axes and seeds make {shown(count)}")


class _Layers(NamedTuple):
    """Settings of all points by full keys: `base`, below what a point gives, and `above` it."""

    base: Mapping[str, Any]
    above: Mapping[str, Any]


def _base(spec: StudySpec, layers: _Layers, point: Point) -> dict[str, Any]:
    """The base of a point's rows by full keys: the study's, what is given for the point, and the layer above."""
    base = {**layers.base}
    for name, value in point:
        base.update(_given(spec, name, value) if name != VARIANT else {})
    return {**base, **layers.above}


def _given(spec: StudySpec, name: str, value: Any) -> dict[str, Any]:
    """The settings given for a value on an axis, by full keys; for a variant without any, the method of that name."""
    otherwise = {"method": value} if name == VARIANT else {}
    return with_full_keys(spec.given.get(name, {}).get(plain(value), otherwise))


def _set_by(spec: StudySpec, point: Point) -> dict[str, Any]:
    """The settings of a point's rows by full keys: each axis sets its own setting, a variant what is given for it."""
    found: dict[str, Any] = {}
    for name, value in point:
        found.update(_given(spec, name, value) if name == VARIANT else {full_key(name): value})
    return found


def _check_variants(spec: StudySpec, sweep: Mapping[str, tuple[str, list[Any]]]) -> None:
    """Raise InputError for an unknown variant, and for one that sets another axis."""
    from basisadapt.methods import METHODS

    _, variants = sweep.get(VARIANT, ("", []))
    known = [*spec.given.get(VARIANT, {}), *METHODS]
    for value in map(plain, variants):
        if value not in known:
            raise unknown("variant", value, known)
        for key in _given(spec, VARIANT, value):
            if key in sweep:
                raise InputError(f"variant {value!r} sets {key}, which is an axis of its own")


def _swept_row(spec: StudySpec, layers: _Layers, point: Point, seeds: Sequence[int]) -> Row:
    # The published table has no task that a preset or the command line adds.
    told = [(name, value) for name, value in point if name != "task" or "task" in spec.sweep]
    published = ",".join(f"{name}={plain(value)}" for name, value in told)
    if spec.answers is not None:
        published = {plain(row): name for row, name in spec.answers.rows.items()}.get(label_of(told), published)
    row = Row((), point, published=(published,))
    return _row(spec, row, {**_base(spec, layers, point), **_set_by(spec, point)}, seeds)


def _row(spec: StudySpec, row: Row, flat: Mapping[str, Any], seeds: Sequence[int]) -> Row:
    """The row with its cells and its full published name."""
    from basisadapt.training.config import RunConfig

    configs = (RunConfig.from_mapping({**nest(flat), "seed": seed}) for seed in seeds)
    cells = tuple(Cell(spec.name, row.label, config) for config in configs)
    published = row.published
    if spec.answers is not None and spec.answers.names:
        own = [] if row.beside is None else [row.beside]
        parts = [*own, *(plain(value) for _, value in row.point)]
        published = tuple(spec.answers.names.get(part, part) for part in parts)
    if published is not None and spec.answers is not None and isinstance(spec.answers.column, dict):
        published = (*published, cells[0].config.method)
    return replace(row, cells=cells, published=published)


def _scaled(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with each factor replaced by its multiple of the base."""
    scaled = dict(values)
    for key, value in values.items():
        if isinstance(value, Factor):
            if not isinstance(base.get(key), int | float):
                raise InputError(f"{key} is set to x{value.factor:g}, a factor, but the base has no number for it")
            scaled[key] = base[key] * value.factor
    return scaled


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    sound = isinstance(seeds, list | tuple) and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(sound, "seeds", seeds, "whole numbers of at least 0")
    return tuple(dict.fromkeys(seeds))
