"""The cells of a study: what its file states with the preset's and the command line's changes worked in."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

from basisadapt.core.errors import InputError, shown, unknown
from basisadapt.study.plan.spec import (
    RULE,
    SWEEP,
    TUNE,
    VARIANT,
    Factor,
    Name,
    Reference,
    StudySpec,
    axes_in,
    list_studies,
    parse_yaml,
)

if TYPE_CHECKING:  # run configurations need torch, which --help and --list must not wait for
    from basisadapt.training.config import RunConfig


Point = tuple[tuple[str, Any], ...]  # one value on every axis: (axis' name, value), ...


@dataclass(frozen=True)
class Row:
    """A row of the table: a configuration, run with every seed.

    point: its values on the axes; of a row beside them, which is called `beside`, the task's alone. published: its name
    in `published_values`. group: what it shares with the row that it is compared with; is_reference: whether it is the
    one that the others of its group are compared with.
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
        """What it is called: the values, joined by ", "."""
        return label_of(self.point, self.beside)

    @cached_property
    def name(self) -> str:
        """The label without the task, which rows of other tasks share."""
        return label_of([(axis, value) for axis, value in self.point if axis != "task"], self.beside) or self.label


def label_of(point: Iterable[tuple[str, Any]], beside: str | None = None) -> str:
    """What a row at a point is called, and one beside the axes."""
    return ", ".join([*([] if beside is None else [beside]), *(plain(value) for _, value in point)])


@dataclass(frozen=True)
class Cell:
    """One run of a study; `key` identifies it in every record.

    named: the axes and settings, in full, that the study's rows or the command line set: what tells its cells apart.
    point: its row's.
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
        """The configuration by full keys, such as adapter.r."""
        config = self.config.to_mapping()
        parts = {name: config.pop(name) for name in list(config) if isinstance(config[name], dict)}
        return {**config, **{f"{part}.{key}": v for part, values in parts.items() for key, v in values.items()}}

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of `named` that it has, with their values: the variant, and the settings of its method."""
        known = {**{axis: value for axis, value in self.point if axis == VARIANT}, **self.settings}
        return {key: known[key] for key in self.named if key in known}

    @cached_property
    def key(self) -> str:
        """See `cell_key`."""
        return cell_key(self.study, self.config.to_mapping())


def cell_key(study: str, config: Mapping[str, Any]) -> str:
    """A hash of study, configuration and seed: 16 hexadecimal digits. A setting that came late changes no older key."""
    from basisadapt.training.config import identity

    settings = {name: value for name, value in identity(config).items() if name != "seed"}
    canonical = json.dumps({"study": study, "config": settings, "seed": config.get("seed")}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A spec with the command line's changes worked in: the rows to fill."""

    spec: StudySpec
    rows: tuple[Row, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, row by row."""
        return tuple(cell for row in self.rows for cell in row.cells)

    @property
    def in_turn(self) -> tuple[Cell, ...]:
        """Every cell in the order in which they are run: of rows that are compared seed by seed, the reference first,
        so that differences show early and become surer."""
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
    """The cells of `spec`: base < given < preset < changes ("key=value") < axis value or the row's own `set`.

    Every configuration is checked; what the spec tunes is left at the base's value. Raises InputError.
    """
    split = split_changes(changes)
    if preset not in spec.presets and preset != "quick":  # quick is the default, which a study need not name
        raise unknown("preset", preset, spec.presets)
    preset_values = dict(spec.presets.get(preset, {}))
    preset_seeds = preset_values.pop("seeds", None)
    seeds = _checked_seeds(seeds or preset_seeds or spec.seeds)

    preset_axes = axes_in(preset_values, SWEEP)
    preset_values = {name: value for name, value in preset_values.items() if not name.startswith((SWEEP, TUNE))}
    above = {**_with_full_keys(preset_values), **split.overrides}
    sweep: dict[str, tuple[str, list[Any]]] = {}
    for name, points in (*spec.sweep.items(), *preset_axes.items(), *split.sweep.items()):
        sweep[_axis_key(name)] = (name, points)
    _check_variants(spec, sweep)

    given = (values for of_axis in spec.given.values() for values in of_axis.values())
    own = (name for values in (*given, *(beside.set for beside in spec.beside)) for name in values)
    named = tuple(dict.fromkeys([*sweep, *map(full_key, own), *split.overrides]))
    only_tasks = list(sweep) == ["task"] and not spec.sweep and bool(spec.beside)  # then it multiplies the rows beside
    swept = [] if only_tasks or not sweep else product(sweep.values())
    tasks = sweep["task"][1] if "task" in sweep else [None]
    check_count((len(swept) + len(spec.beside) * len(tasks)) * len(seeds))
    layers = _Layers(_flat(spec.base), above)
    with _hint_at_axes(split.lists):
        rows = [_swept_row(spec, layers, point, seeds) for point in swept]
        for beside in spec.beside:
            for point in [(("task", task),) for task in tasks] if "task" in sweep else [()]:
                base = _base(spec, layers, point)
                config = {**base, **_scaled(base, _with_full_keys(beside.set)), **dict(point)}
                published = None if beside.published is None else (beside.published,)
                rows.append(_row(spec, Row((), point, beside.label, published), config, seeds))

    labels = [row.label for row in rows]
    for label, count in collections.Counter(labels).items():
        if count > 1:
            raise InputError(f"study {spec.name!r} has two rows called {label!r}")
    if not rows:
        raise InputError(f"study {spec.name!r} has no rows: give it a sweep or rows beside it")
    rows = [_grouped(_told_apart(row, named), spec.reference, sweep) for row in rows]
    if spec.reference is not None and not any(row.is_reference for row in rows):
        raise unknown("reference row", str(spec.reference), labels)
    return Study(on_own_data(spec, rows), tuple(rows))


@contextmanager
def _hint_at_axes(lists: Mapping[str, str]) -> Iterator[None]:
    """Say of a value with commas that is refused how each of its parts makes a row."""
    try:
        yield
    except InputError as error:
        for key, text in lists.items():
            if repr(text) in str(error):
                axis = f"{SWEEP}{key.removeprefix('adapter.')}"
                raise InputError(f"{error}; for a row of each value: --set {axis}={text}") from error
        raise


def on_own_data(spec: StudySpec, rows: Iterable[Row]) -> StudySpec:
    """A shipped study without what is published of its tasks, and claimed, where a row is of the user's own data."""
    from basisadapt import tasks
    from basisadapt.tasks.own_data import OwnData

    configs = (row.cells[0].config for row in rows)
    data = dict.fromkeys((config.task, config.data) for config in configs)
    if spec.name not in list_studies() or not any(isinstance(tasks.find(*one), OwnData) for one in data):
        return spec
    return replace(spec, answers=None, claims=())


def parameter_values(spec: StudySpec, cells: Iterable[Cell]) -> dict[str, list[Any]]:
    """A parameter of the cells to its values: those of an axis in the study's file, under whichever preset, and then
    those that cells have beside, so that a part of the study's own has the same values as the whole."""
    found: dict[str, list[Any]] = {}
    for axes in (spec.sweep, *(axes_in(overrides, SWEEP) for overrides in spec.presets.values())):
        for name, values in axes.items():
            _add(found, _axis_key(name), values)
    for cell in {cell.row: cell for cell in cells}.values():
        for key, value in cell.parameters.items():
            _add(found, key, [value])
    return found


def _add(found: dict[str, list[Any]], key: str, values: Iterable[Any]) -> None:
    known = found.setdefault(key, [])
    known.extend(value for value in values if value not in known)


def _told_apart(row: Row, named: tuple[str, ...]) -> Row:
    return replace(row, cells=tuple(replace(cell, named=named, point=row.point) for cell in row.cells))


def _grouped(row: Row, reference: Reference | None, axes: Iterable[str]) -> Row:
    """The row with its group; axes: in full."""
    if reference is None or reference.axis is None:
        is_called = reference is not None and reference.value in (row.name, row.label)
        return replace(row, group=(row.task,), is_reference=is_called)
    axis = _axis_key(reference.axis)
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
    """Every combination of the axes' values; one empty point where there is no axis. Raises InputError if too many."""
    axes = list(axes)
    check_count(math.prod(len(points) for _, points in axes))
    return list(itertools.product(*([(name, value) for value in points] for name, points in axes)))


def check_count(count: int) -> None:
    """Raise InputError for more cells than anybody runs: a slip of the pen that would take hours to write down."""
    if count > MAX_CELLS:
        raise InputError(f"a study may have at most {MAX_CELLS:,} cells, and its axes and seeds make {shown(count)}")


class _Layers(NamedTuple):
    """Settings by full keys that hold for every point: the study's base, and what is above what a point gives."""

    base: Mapping[str, Any]
    above: Mapping[str, Any]


def _base(spec: StudySpec, layers: _Layers, point: Point) -> dict[str, Any]:
    """The base of a point's rows, by full keys: the study's, what the point's values set over it, and what is above."""
    base = {**layers.base}
    for name, value in point:
        base.update(_given(spec, name, value) if name != VARIANT else {})
    return {**base, **layers.above}


def _given(spec: StudySpec, name: str, value: Any) -> dict[str, Any]:
    """What is given for an axis' value, by full keys; for a variant without anything, which a method's name may be, the
    method."""
    otherwise = {"method": value} if name == VARIANT else {}
    return _with_full_keys(spec.given.get(name, {}).get(plain(value), otherwise))


def _set_by(spec: StudySpec, point: Point) -> dict[str, Any]:
    """What a point's values set in its rows, by full keys: each the setting of that name, but a variant what is given
    for it."""
    found: dict[str, Any] = {}
    for name, value in point:
        found.update(_given(spec, name, value) if name == VARIANT else {full_key(name): value})
    return found


def _check_variants(spec: StudySpec, sweep: Mapping[str, tuple[str, list[Any]]]) -> None:
    """Raise InputError for a variant that nothing is given for, or that sets what another axis does."""
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
    # A task that a preset or the command line adds is none of the published table's.
    told = [(name, value) for name, value in point if name != "task" or "task" in spec.sweep]
    published = ",".join(f"{name}={plain(value)}" for name, value in told)
    if spec.answers is not None:
        published = {plain(row): name for row, name in spec.answers.rows.items()}.get(label_of(told), published)
    row = Row((), point, published=(published,))
    return _row(spec, row, {**_base(spec, layers, point), **_set_by(spec, point)}, seeds)


def _row(spec: StudySpec, row: Row, flat: Mapping[str, Any], seeds: Sequence[int]) -> Row:
    """The row with its cells, and with the whole of its published name."""
    from basisadapt.training.config import RunConfig

    configs = (RunConfig.from_mapping({**_nested(flat), "seed": seed}) for seed in seeds)
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
    """`values` with factors worked out."""
    scaled = dict(values)
    for key, value in values.items():
        if isinstance(value, Factor):
            if not isinstance(base.get(key), int | float):
                raise InputError(f"{key} is set to x{value.factor:g}, a factor, but the base has no number for it")
            scaled[key] = base[key] * value.factor
    return scaled


@dataclass(frozen=True)
class Changes:
    """The command line's changes: overrides of the base, by full key; replaced axes of the rows and of what is tuned,
    by name, and what is replaced of the rule of tuning, likewise. lists: overrides that may be meant as an axis, as
    they are written."""

    overrides: dict[str, Any]
    sweep: dict[str, list[Any]]
    tune: dict[str, Any]
    lists: dict[str, str] = field(default_factory=dict)


def split_changes(changes: Sequence[str]) -> Changes:
    """The command line's "key=value", by kind. Raises InputError."""
    split = Changes({}, {}, {})
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
            axes[name] = [_read(key, _axis_key(name), part.strip()) for part in parts]
        else:
            split.overrides[full_key(key)] = _read(key, full_key(key), text)
            if "," in text and not text.startswith(("[", "{")):
                split.lists[full_key(key)] = text
    return split


def _read(option: str, key: str, text: str) -> Any:
    """What the command line gives a setting: a text as it is written, whatever it says in YAML, or a YAML value.

    Of a setting that may be a text or something else, what is nothing else is a text.
    """
    types = _types(key)
    if types <= {str, NoneType}:
        return None if NoneType in types and text in ("null", "~", "") else text
    try:
        value = parse_yaml(text, f"--set {option}")
    except InputError:
        if str not in types:
            raise
        return text
    return text if isinstance(value, str) else value


def _types(key: str) -> set[Any]:
    """The types that an axis or a setting may have, by its full key; of an adapter's in all methods."""
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


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list | tuple) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"seeds must be whole numbers of at least 0, got {shown(seeds)}")
    return tuple(dict.fromkeys(seeds))


def known_keys() -> tuple[str, ...]:
    """Every key that a configuration may set, in full."""
    from basisadapt.methods import METHODS

    return _keys_with(tuple(METHODS[name].settings for name in METHODS))


@lru_cache(maxsize=2)
def _keys_with(settings: tuple[type, ...]) -> tuple[str, ...]:
    """known_keys() while methods have these settings: a large study asks tens of thousands of times."""
    from basisadapt.phi.settings import field_names
    from basisadapt.tasks import DataSettings
    from basisadapt.training.config import TrainSettings, adapter_keys

    groups = {"adapter": adapter_keys(), "train": field_names(TrainSettings), "data": field_names(DataSettings)}
    return ("task", "backbone", "method", *(f"{group}.{name}" for group, names in groups.items() for name in names))


def full_key(name: str) -> str:
    """A key in full: a name without a dot may be that of an adapter's setting. Raises InputError."""
    known = known_keys()
    if f"adapter.{name}" in known:
        return f"adapter.{name}"
    if name not in known:
        raise unknown("key", name, known)
    return name


def _axis_key(name: str) -> str:
    """An axis' name in full: that of a setting, or VARIANT. Raises InputError."""
    return name if name == VARIANT else full_key(name)


def _with_full_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {full_key(name): value for name, value in values.items()}


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"adapter": {"r": 4}} as {"adapter.r": 4}, with every key checked."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat.update(_with_full_keys(inner))
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group, dot, key = name.partition(".")
        if dot:
            nested.setdefault(group, {})[key] = value
        else:
            nested[name] = value
    return nested


def plain(value: Any) -> str:
    """A value as the command line takes it: true, 0.5, sinc."""
    return value if isinstance(value, str) else json.dumps(value)
