"""What a study is: a YAML file in `studies/`, the command line's changes to it, and the cells they make."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from basisadapt.errors import InputError, unknown
from basisadapt.settings import from_mapping
from basisadapt.study.claims import Claim

if TYPE_CHECKING:  # run configurations need torch, which --help and --list must not wait for
    from basisadapt.run_config import RunConfig

PRESETS = ("smoke", "quick", "paper")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The published table that a study answers.

    table: a file in `studies/paper/`; also: others that print the same values. key, column, std: the columns with a
    row's name, its value and the value's standard deviation; where methods have columns of their own, a method to its
    column. setting: on what it was measured.
    rows: the label of a row of the sweep to its name in the table, where that is not "axis=value,...". left_out: a row
    of the table that no row of the study answers, to the reason.
    """

    table: str
    key: str
    column: str | dict[str, str]
    std: str | dict[str, str] | None = None
    setting: str = ""
    also: tuple[str, ...] = ()
    rows: dict[Any, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A row beside the sweep: its label, what it `set`s over the base, its row of the published table.

    A number may be set by its factor to the base's: x0.5 is half of it.
    """

    label: str
    set: dict[str, Any]
    published: str | None = None


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A study as its file states it.

    title, question: what is compared and how to read it. base: the configuration that all rows share. sweep:
    an axis' name to its values; the rows are their product. beside: further rows, which no axis changes.
    reference: the label of the row that the others are compared with; or one axis' value, such as method=lora: then
    each row's reference is the one that is equal on the other axes. answers: the published table. presets:
    a name to dotted overrides of the base, `seeds`, and axes in full: sweep.AXIS. columns: further recorded metrics to
    show. claims: of the paper, each judged by the record. search: setting to its range in a search, see `search_space`.

    A file that is `like` a shipped study takes over its base, presets and seeds, and states what differs. An axis
    called `task` also multiplies the rows beside; `reference` is then a label without its task.
    """

    name: str
    title: str
    question: str
    base: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    beside: tuple[Beside, ...] = ()
    reference: str | None = None
    answers: Answers | None = None
    seeds: tuple[int, ...] = (42, 123, 456)
    presets: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    search: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of the table: a configuration, run with every seed.

    published: its key in `published_values`. group: what it shares with the row that it is compared with; is_reference:
    whether it is the one that the others of its group are compared with.
    """

    label: str
    published: str | None
    cells: tuple[Cell, ...]
    group: tuple[Any, ...] = ()
    is_reference: bool = False

    @property
    def task(self) -> str:
        """The task of its cells."""
        return self.cells[0].config.task

    @property
    def name(self) -> str:
        """The label without the task, which rows of other tasks share."""
        return ", ".join(part for part in self.label.split(", ") if part != self.task) or self.label


@dataclass(frozen=True)
class Cell:
    """One run of a study; `key` identifies it in every record."""

    study: str
    row: str
    config: RunConfig

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.seed

    @property
    def key(self) -> str:
        """A hash of study, configuration and seed: 16 hexadecimal digits."""
        config = self.config.to_mapping()
        seed = config.pop("seed")
        canonical = json.dumps({"study": self.study, "config": config, "seed": seed}, sort_keys=True)
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


# --- reading ---


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, except that 1e-3 is a number here as everywhere else (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises InputError that names `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def studies_dir() -> Path:
    """The folder of the shipped studies: in an installed package, or beside the package in a repository."""
    package = Path(__file__).parents[1]
    installed = package / "studies"
    return installed if installed.is_dir() else package.parent / "studies"


def list_studies() -> list[str]:
    """The names of the shipped studies."""
    return sorted(path.stem for path in studies_dir().glob("*.yaml"))


def read_spec(name: str) -> StudySpec:
    """The study called `name`, or the one in the file of that path. Raises InputError."""
    path, values = _read_file(name)
    try:
        return _spec({**values, "name": path.stem})
    except InputError as error:
        raise InputError(f"study file {str(path)!r}: {error}") from error


def _read_file(name: str) -> tuple[Path, dict[str, Any]]:
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else studies_dir() / f"{name}.yaml"
    if not is_path and name not in list_studies():
        raise unknown("study", name, list_studies())
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), f"study file {str(path)!r}")
    except OSError as error:
        raise InputError(f"study file {str(path)!r} cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise InputError(f"study file {str(path)!r} must hold keys and values")
    if "like" in values:
        other = _read_file(str(values.pop("like")))[1]
        values = _merged({key: other[key] for key in ("base", "presets", "seeds") if key in other}, values)
    return path, values


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    both = {key: value for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: _merged(below[key], value) for key, value in both.items()}}


def _spec(values: dict[str, Any]) -> StudySpec:
    for key in ("title", "question"):
        if key not in values:
            raise InputError(f"{key} is missing")
    if values.get("answers") is not None:
        values["answers"] = _part(Answers, values["answers"], "answers")
    values["beside"] = [_part(Beside, row, f"beside[{index}]") for index, row in enumerate(values.get("beside") or ())]
    values["claims"] = [
        _part(Claim, claim, f"claims[{index}]") for index, claim in enumerate(values.get("claims") or ())
    ]
    spec = from_mapping(StudySpec, values)
    _check_axes(spec.sweep)
    for preset, overrides in spec.presets.items():
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if not isinstance(overrides, dict):
            raise InputError(f"presets.{preset} must hold keys and values, got {overrides!r}")
        _check_axes(_axes(overrides))
    return spec


def _check_axes(axes: Mapping[str, Any]) -> None:
    for axis, points in axes.items():
        if not isinstance(points, list) or not points:
            raise InputError(f"sweep.{axis} must be a list of values, got {points!r}")


def _axes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that replace an axis, by its name."""
    return {name.removeprefix("sweep."): value for name, value in values.items() if name.startswith("sweep.")}


def _part(cls: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where} must hold keys and values, got {values!r}")
    try:
        return from_mapping(cls, values, where)
    except TypeError as error:  # a field without default is missing
        raise InputError(f"{where}: {error}") from error


# --- from spec to cells ---


def resolve(
    spec: StudySpec, *, preset: str = "quick", changes: Sequence[str] = (), seeds: Sequence[int] | None = None
) -> Study:
    """The cells of `spec`: base < preset < changes ("key=value") < axis value or the row's own `set`.

    Every configuration is checked. Raises InputError.
    """
    overrides, axes = split_changes(changes)
    if preset not in spec.presets and preset != "quick":  # quick is the default, which a study need not name
        raise unknown("preset", preset, spec.presets)
    preset_values = dict(spec.presets.get(preset, {}))
    preset_seeds = preset_values.pop("seeds", None)
    seeds = _checked_seeds(seeds or preset_seeds or spec.seeds)

    preset_axes = _axes(preset_values)
    preset_values = {name: value for name, value in preset_values.items() if not name.startswith("sweep.")}
    base = {**_flat(spec.base), **_with_full_keys(preset_values), **overrides}
    sweep: dict[str, tuple[str, list[Any]]] = {}
    for name, points in (*spec.sweep.items(), *preset_axes.items(), *axes.items()):
        sweep[full_key(name)] = (name, points)

    rows = [_swept_row(spec, base, point, seeds) for point in _product(sweep.values())] if sweep else []
    for beside in spec.beside:
        for task in sweep["task"][1] if "task" in sweep else [None]:
            label = beside.label if task is None else f"{beside.label}, {task}"
            of_task = {} if task is None else {"task": task}
            config = {**base, **_scaled(base, _with_full_keys(beside.set)), **of_task}
            rows.append(_row(spec, label, beside.published, config, seeds))

    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"study {spec.name!r} has two rows called {label!r}")
    if not rows:
        raise InputError(f"study {spec.name!r} has no rows: give it a sweep or rows beside it")
    rows = [_grouped(row, spec.reference, sweep) for row in rows]
    if spec.reference is not None and not any(row.is_reference for row in rows):
        raise unknown("reference row", spec.reference, labels)
    return Study(spec, tuple(rows))


def _grouped(row: Row, reference: str | None, axes: Iterable[str]) -> Row:
    """The row with its group; axes: in full."""
    axis, equals, value = (reference or "").partition("=")
    if not equals:
        return replace(row, group=(row.task,), is_reference=reference in (row.name, row.label))
    mapping = row.cells[0].config.to_mapping()
    flat = {**mapping, **{f"{part}.{key}": v for part in ("adapter", "train") for key, v in mapping[part].items()}}
    others = dict.fromkeys(["task", *axes])
    others.pop(full_key(axis), None)
    return replace(
        row,
        group=tuple(flat.get(key) for key in others),
        is_reference=full_key(axis) in axes and _plain(flat.get(full_key(axis))) == value,
    )


Point = tuple[tuple[str, Any], ...]  # one value on every axis: (axis' name, value), ...


def _product(axes: Iterable[tuple[str, list[Any]]]) -> list[Point]:
    return list(itertools.product(*([(name, value) for value in points] for name, points in axes)))


def _swept_row(spec: StudySpec, base: Mapping[str, Any], point: Point, seeds: Sequence[int]) -> Row:
    label = ", ".join(_plain(value) for _, value in point)
    published = ",".join(f"{name}={_plain(value)}" for name, value in point)
    if spec.answers is not None:
        published = {_plain(row): name for row, name in spec.answers.rows.items()}.get(label, published)
    return _row(spec, label, published, {**base, **_with_full_keys(dict(point))}, seeds)


def _row(spec: StudySpec, label: str, published: str | None, flat: Mapping[str, Any], seeds: Sequence[int]) -> Row:
    from basisadapt.run_config import RunConfig

    configs = (RunConfig.from_mapping({**_nested(flat), "seed": seed}) for seed in seeds)
    cells = tuple(Cell(spec.name, label, config) for config in configs)
    if published is not None and spec.answers is not None and isinstance(spec.answers.column, dict):
        published = f"{published}, {cells[0].config.method}"
    return Row(label, published, cells)


def _scaled(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with factors such as x0.5 worked out."""
    scaled = dict(values)
    for key, value in values.items():
        if isinstance(value, str) and (factor := re.fullmatch(r"x(\d+(?:\.\d+)?)", value)):
            if not isinstance(base.get(key), int | float):
                raise InputError(f"{key} is set to {value}, a factor, but the base has no number for it")
            scaled[key] = base[key] * float(factor[1])
    return scaled


def split_changes(changes: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The command line's "key=value" as overrides of the base (by full key) and replaced axes (by name)."""
    overrides: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set needs key=value, got {change!r}")
        if key.startswith("sweep."):
            parts = [part for part in text.split(",") if part.strip()]
            if not parts:
                raise InputError(f"--set {key} needs at least one value")
            full_key(key.removeprefix("sweep."))
            axes[key.removeprefix("sweep.")] = [parse_yaml(part, f"--set {key}") for part in parts]
        else:
            overrides[full_key(key)] = parse_yaml(text, f"--set {key}")
    return overrides, axes


def _checked_seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list | tuple) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"seeds must be whole numbers of at least 0, got {seeds!r}")
    return tuple(dict.fromkeys(seeds))


def known_keys() -> list[str]:
    """Every key that a configuration may set, in full."""
    from basisadapt.methods import METHODS
    from basisadapt.phi.settings import field_names
    from basisadapt.run_config import TrainSettings

    adapter = {name: None for method in METHODS.values() for name in field_names(method.settings)}
    train = field_names(TrainSettings)
    return ["task", "backbone", "method", *(f"adapter.{n}" for n in adapter), *(f"train.{n}" for n in train)]


def full_key(name: str) -> str:
    """A key in full: a name without a dot may be that of an adapter's setting. Raises InputError."""
    known = known_keys()
    if f"adapter.{name}" in known:
        return f"adapter.{name}"
    if name not in known:
        raise unknown("key", name, known)
    return name


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


def _plain(value: Any) -> str:
    """A value as the command line takes it: true, 0.5, sinc."""
    return value if isinstance(value, str) else json.dumps(value)


# --- the published table ---


def published_values(answers: Answers | None) -> dict[str, tuple[str, str | None]]:
    """A row's name -> (value, standard deviation) of the published table, as printed there.

    Where methods have columns of their own, the key is "name, method".
    """
    if answers is None:
        return {}
    path = studies_dir() / "paper" / answers.table
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns, stds = _by_method(answers.column), _by_method(answers.std)
        return {
            f"{row[answers.key]}{suffix}": (row[column], row[stds[suffix]] if suffix in stds else None)
            for suffix, column in columns.items()
            for row in rows
        }
    except OSError as error:
        raise InputError(f"published table {str(path)!r} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise InputError(f"published table {answers.table} has no column {error}") from error


def _by_method(column: str | dict[str, str] | None) -> dict[str, str]:
    """What a row's name ends with, to the column: ", phi" and ", lora", or nothing if methods share a column."""
    if isinstance(column, dict):
        return {f", {method}": name for method, name in column.items()}
    return {} if column is None else {"": column}
