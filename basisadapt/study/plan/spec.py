"""A study as its YAML file states it, and the published table that it answers."""

from __future__ import annotations

import collections
import csv
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, cast

import yaml

from basisadapt.core.errors import InputError, one_line, refusing, shown, unknown
from basisadapt.core.settings import WHOLE, from_mapping
from basisadapt.study.plan.claims import COMMON, PLATEAU, Claim

PRESETS = ("smoke", "quick", "gpu", "llm", "encoder", "paper")
MAX_BYTES = 1_000_000  # of a study's file
SWEEP, TUNE = "sweep.", "tune."  # prefixes of the keys of axes, and of tuned settings
VARIANT = "variant"  # an axis whose values name groups of settings in `given`
ALL = "all"  # tune.at: all values of the grid

Name = tuple[str, ...]  # a row of a published table: its parts, then the method if methods have columns


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """The published table that a study answers.

    table: a file in `studies/paper/`.
    key: the column with a row's name, or several columns with its parts.
    column: the column with the value, or method to column if methods have columns of their own.
    std: the same for the standard deviation. Default None, there is none.
    setting: what it was measured on. Default "".
    where: column to the value that a row must have there. Default: all rows.
    rows: label of a row of the sweep to its published name, where that is not "axis=value,...". Default {}.
    names: value on an axis, such as a method or a task, to its published name. If given, a row's published name is
        these names in the order of the axes. Default {}.
    """

    table: str
    key: str | list[str]
    column: str | dict[str, str]
    std: str | dict[str, str] | None = None
    setting: str = ""
    where: dict[str, str] = field(default_factory=dict)
    rows: dict[Any, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Factor:
    """A multiple of the base's value: x0.5 is half of it."""

    factor: float

    @staticmethod
    def parse(value: Any) -> Any:
        """The factor of a text such as "x0.5"; any other value unchanged."""
        found = re.fullmatch(r"x(\d+(?:\.\d+)?)", value) if isinstance(value, str) else None
        return Factor(float(found[1])) if found else value


@dataclass(frozen=True)
class Reference:
    """The row that others are compared with: the row with the label `value`; or, with an axis, the row with `value` on
    that axis and the same values on the others."""

    value: str
    axis: str | None = None

    def __str__(self) -> str:
        return self.value if self.axis is None else f"{self.axis}={self.value}"


@dataclass(frozen=True, kw_only=True)
class ExtraRow:
    """A row in addition to the sweep.

    label: its name.
    set: key to the value, or the `Factor`, that replaces the base's.
    published: its name in the published table. Default None, it is not there.
    """

    label: str
    set: dict[str, Any]
    published: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tune:
    """How settings are tuned for each row before the row is run (see `tuning`).

    grid: setting to the values to try; with several settings, all combinations.
    seeds: the seeds of the trials, none of them the study's.
    validation: the share of the training rows that trials are evaluated on. null if other seeds draw other rows
        (`tasks.SeededTask`). Either way, nothing is chosen on the reported rows.
    by: "score", choose the greatest mean of the headline metric, or "loss", choose the least mean eval_loss, which
        varies less if few rows are held out. Default "score".
    at: values above 0 of the only tuned setting at which every row is also run with the study's seeds, for a curve:
        a list, or "all" for the grid's. Default None.
    common: one more such value, at which all rows are compared with each other. Default None.

    Raises InputError for other values.
    """

    grid: dict[str, Any]
    seeds: tuple[int, ...]
    validation: float | None
    by: str = "score"
    at: list[float] | str | None = None
    common: float | None = None

    def __post_init__(self) -> None:
        _check_axes(self.grid, TUNE)
        if self.by not in ("score", "loss"):
            raise InputError(f"tune.by must be score or loss, got {shown(self.by)}")
        if self.at is None and self.common is None:
            return
        if isinstance(self.at, str) and self.at != ALL:
            raise InputError(f"tune.at must be a list of numbers or {ALL}, got {shown(self.at)}")
        if len(self.grid) != 1:
            raise InputError(f"tune.at and tune.common need one tuned setting, got {', '.join(self.grid) or 'none'}")
        for value in self._listed:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise InputError(f"tune.at and tune.common must be numbers above 0, got {shown(value)}")

    @property
    def setting(self) -> str:
        """The first tuned setting: the only one if there is `at` or `common`; "" for an empty grid."""
        return next(iter(self.grid), "")

    @property
    def values(self) -> list[float]:
        """`at` and `common` as numbers, in ascending order."""
        return sorted(set(self._listed))

    @property
    def _listed(self) -> list[Any]:
        values = self.grid[self.setting] if self.at == ALL else self.at or ()
        return [*values, *(() if self.common is None else (self.common,))]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law that the report fits to rows that differ in one axis alone, see `report.law`.

    axis: the axis x, of numbers above 0.
    full: a metric from 0 to 1, the share of what there is that a row holds. Rows with nearly all are left out. Default
        None, none is.
    """

    axis: str
    full: str | None = None


@dataclass(frozen=True, kw_only=True)
class Map:
    """Two axes over which the report draws the differences to the reference, see `report.figures.map_figure`."""

    x: str
    y: str


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A figure of lines along an axis of the study, see `report.figures.lines_figure`.

    along: the axis. Rows that differ in it alone are one line.
    against: the metric on the horizontal axis. Default None, the values of `along`.
    """

    along: str
    against: str | None = None


RULE = ("seeds", "validation", "by", "at", "common")  # fields of Tune that tune.NAME may replace


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A study as its file states it.

    name: the name of its file without the suffix.
    title: what is compared.
    question: how to read the result.
    base: the configuration that all rows share. Default {}.
    sweep: axis to its values; the rows are the product of the axes. Default {}.
    given: axis to value to the settings that rows with this value set over the base. The file has one key for both,
        such as method=vera. Default {}.
    beside: rows in addition to the sweep, which no axis but `task` changes. Default none.
    reference: see `Reference`. The file has a row's label, or a value on an axis, such as method=lora. Default None.
    answers: the published table. Default None.
    seeds: the seeds of every row. Default 42, 123, 456.
    tune: what is tuned for each row before it is run. Default None.
    presets: preset to `seeds`, dotted overrides of the base, whole axes (sweep.AXIS), tuned settings (tune.SETTING)
        and fields of `Tune` (tune.NAME). Default {}.
    columns: more metrics to show, or quotients of two, such as "bits / parameters.trainable". Default none.
    against: metrics to plot the headline metric against. Default none.
    claims: the claims of the paper. Default none.
    search: setting to its range in a search, see `search_space`. Default {}.
    law: see `Law`. Default None, none is fitted.
    map: see `Map`. Default None, none is drawn.
    lines: see `Lines`. Default None, none are drawn.

    A file that is `like` a shipped study inherits its base, presets and seeds; a preset that is null there is dropped.
    The values of an axis called `variant` are names: each stands for the settings in `given`, or for the method of that
    name. Like every axis, it takes precedence over preset and command line. An axis called `task` also multiplies the
    rows in `beside`, and only those if a preset or the command line adds it to a study without axes. `reference` is
    then a label without its task.
    """

    name: str
    title: str
    question: str
    base: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: tuple[ExtraRow, ...] = ()
    reference: Reference | None = None
    answers: PublishedTable | None = None
    seeds: tuple[int, ...] = (42, 123, 456)
    tune: Tune | None = None
    presets: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    search: dict[str, Any] = field(default_factory=dict)
    law: Law | None = None
    map: Map | None = None
    lines: Lines | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that its columns, figures and claims name."""
        claimed = (metric for claim in self.claims for metric in (claim.metric, claim.per) if metric is not None)
        full = () if self.law is None or self.law.full is None else (self.law.full,)
        horizontal = () if self.lines is None or self.lines.against is None else (self.lines.against,)
        return (*self.columns, *self.against, *full, *horizontal, *claimed)

    @property
    def drawn_along(self) -> tuple[str, ...]:
        """The axes that its law, map and lines name."""
        law = () if self.law is None else (self.law.axis,)
        over = () if self.map is None else (self.map.x, self.map.y)
        return (*law, *over, *(() if self.lines is None else (self.lines.along,)))


# --- reading ---


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, except that it reads 1e-3 as a number (YAML 1.1 requires 1.0e-3).

    It refuses aliases (*name), since a few lines of them can expand beyond memory or refer to themselves; integers that
    a record cannot hold; and duplicate keys.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.Event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"aliases are not supported{event.start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        counts = collections.Counter(key.value for key in keys)
        for key in keys:
            if counts[key.value] > 1:
                raise yaml.YAMLError(f"{key.value} is given more than once{key.start_mark}")
        return super().construct_mapping(node, deep)


def _whole(loader: Any, node: Any) -> int:
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= WHOLE:
        raise yaml.YAMLError(f"a number beyond 64 bits{node.start_mark}")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", cast(Any, _Loader.construct_yaml_str))  # a date stays text
for _tag in ("binary", "omap", "pairs", "set"):  # types that JSON lacks
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", cast(Any, _Loader.construct_undefined))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises InputError, which names `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise InputError(f"{where} is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # not all of a scalar's errors are YAML's own
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def studies_dir() -> Path:
    """The folder of the shipped studies: in an installed package, or beside the package in a repository."""
    package = Path(__file__).parents[2]
    installed = package / "studies"
    found = installed if installed.is_dir() else package.parent / "studies"
    if not found.is_dir():
        raise InputError(
            f"the studies that come with the package are not beside {str(package)!r}: it must be installed"
        )
    return found


def list_studies() -> list[str]:
    """The names of the shipped studies."""
    return sorted(path.stem for path in studies_dir().glob("*.yaml"))


def read_spec(name: str) -> StudySpec:
    """The study called `name`, or the one in the file of that path. Raises InputError."""
    is_path = name.endswith((".yaml", ".yml"))
    if not is_path and name not in list_studies():
        raise unknown("study", name, list_studies())
    path = Path(name) if is_path else studies_dir() / f"{name}.yaml"
    values = _read_file(path, ())
    with refusing(f"study file {str(path)!r}", InputError):
        return _spec({**values, "name": path.stem})


def _read_file(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the file that it is `like`. above: the files that led here."""
    where = f"study file {str(path)!r}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{where} must have at most {MAX_BYTES:,} bytes")
        values: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{where} must hold keys and values")
    _check_paths(values, where)
    if "like" in values:
        other = _like(values.pop("like"), path)
        if other in (*above, path):
            raise InputError(f"{where}: like leads back to {other.name!r}")
        below = _read_file(other, (*above, path))
        values = _merged({key: below[key] for key in ("base", "presets", "seeds") if key in below}, values)
    return values


def _check_paths(values: Any, where: str) -> None:
    """Raise InputError for a path of data or of a model in `values` that leads out of the study's folder."""
    if isinstance(values, list):
        for value in values:
            _check_paths(value, where)
    for key, value in values.items() if isinstance(values, dict) else ():
        if str(key).rpartition(".")[2] not in ("task", "test", "backbone"):
            _check_paths(value, where)
            continue
        for name in value if isinstance(value, list) else [value]:
            path = PurePath(name) if isinstance(name, str) else PurePath()
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"{where}: {key} leads out of the folder; give {shown(name)} with --set")


def _like(name: Any, path: Path) -> Path:
    """The file that the file at `path` is `like`: a shipped study, or one in the same folder. Raises InputError."""
    if isinstance(name, str) and name.endswith((".yaml", ".yml")):
        return path.parent / inside(name, f"study file {str(path)!r}: like")
    if name not in list_studies():
        raise InputError(f"study file {str(path)!r}: like: {unknown('study', name, list_studies())}")
    return studies_dir() / f"{name}.yaml"


def inside(name: str, where: str) -> str:
    """The name of a file in the study's folder, checked. Raises InputError for a path that leads out of it."""
    if PurePath(name).name != name or name == ".." or "\\" in name or "\0" in name:
        raise InputError(f"{where} must be the name of a file in the same folder, got {shown(name)}")
    return name


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    both = {key: value for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: _merged(below[key], value) for key, value in both.items()}}


def _spec(values: dict[str, Any]) -> StudySpec:
    for key in ("title", "question"):
        if key not in values:
            raise InputError(f"{key} is missing")
    if values.get("answers") is not None:
        values["answers"] = _part(PublishedTable, values["answers"], "answers")
        inside(values["answers"].table, "answers.table")
    if values.get("tune") is not None:
        values["tune"] = _part(Tune, values["tune"], "tune")
    if values.get("law") is not None:
        values["law"] = _part(Law, values["law"], "law")
    if values.get("map") is not None:
        values["map"] = _part(Map, values["map"], "map")
    if values.get("lines") is not None:
        values["lines"] = _part(Lines, values["lines"], "lines")
    beside = _parts(ExtraRow, values.get("beside"), "beside")
    values["beside"] = [replace(row, set={k: Factor.parse(v) for k, v in row.set.items()}) for row in beside]
    values["claims"] = _parts(Claim, values.get("claims"), "claims")
    presets = values.get("presets")
    if isinstance(presets, dict):
        values["presets"] = {name: overrides for name, overrides in presets.items() if overrides is not None}
    if values.get("reference") is not None:
        values["reference"] = _reference(values["reference"], _axes(values))
    if isinstance(values.get("given"), dict):
        sweep = values.get("sweep")
        values["given"] = _by_axis(values["given"], sweep if isinstance(sweep, dict) else {})
    spec = from_mapping(StudySpec, values)
    _check_axes(spec.sweep)
    for claim in spec.claims:
        _check_claim(claim, spec.tune)
    for preset, overrides in spec.presets.items():
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
            raise InputError(f"presets.{preset} must hold keys and values, got {shown(overrides)}")
        for kind in (SWEEP, TUNE):
            _check_axes({name: axis for name, axis in axes_in(overrides, kind).items() if name not in RULE}, kind)
    return spec


def _axes(values: Mapping[str, Any]) -> list[str]:
    """The axes of a file's sweep and of its presets, as written there."""
    sweep, presets = values.get("sweep"), values.get("presets")
    parts = presets.values() if isinstance(presets, dict) else ()
    named = [
        axes_in(part, SWEEP) for part in parts if isinstance(part, dict) and all(isinstance(key, str) for key in part)
    ]
    return [name for axes in (sweep, *named) if isinstance(axes, dict) for name in axes]


def _reference(text: Any, axes: Sequence[str]) -> Reference:
    """The reference of a text: AXIS=VALUE if the axis exists, else a label, which may contain "=" too."""
    if not isinstance(text, str):
        raise InputError(f"reference must be text or null, got {shown(text)}")
    axis, equals, value = text.partition("=")
    known = {str(name).removeprefix("adapter.") for name in axes}
    return Reference(value, axis) if equals and axis.removeprefix("adapter.") in known else Reference(text)


def _by_axis(given: Mapping[Any, Any], sweep: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """The settings that a file gives for AXIS=VALUE: axis to value to settings."""
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in given.items():
        axis, _, value = str(name).partition("=")
        if axis not in sweep or not isinstance(overrides, dict):
            raise InputError(
                f"given.{name} must be AXIS=VALUE of the sweep with keys and values, got {shown(overrides)}"
            )
        found.setdefault(axis, {})[value] = overrides
    return found


def _check_claim(claim: Claim, tune: Tune | None) -> None:
    """Raise InputError for a claim on values of the tuned setting at which the study runs no row."""
    at, common = (None, None) if tune is None else (tune.at, tune.common)
    if claim.at is not None and common is None and (at is None or claim.at == COMMON):
        missing = "tune.common" if claim.at == COMMON else "tune.at or tune.common"
        raise InputError(f"claim {claim.text!r} is on rows at {claim.at}, which needs {missing}")
    if claim.metric == PLATEAU and at is None:
        raise InputError(f"claim {claim.text!r} is on a plateau, which needs tune.at")


def _check_axes(axes: Mapping[str, Any], kind: str = SWEEP) -> None:
    for axis, points in axes.items():
        if not isinstance(points, list) or not points:
            raise InputError(f"{kind}{axis} must be a list of values, got {shown(points)}")


def axes_in(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The entries of `values` with the prefix `kind`, SWEEP or TUNE, by the name after it."""
    return {name.removeprefix(kind): value for name, value in values.items() if name.startswith(kind)}


def _part(cls: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where} must hold keys and values, got {shown(values)}")
    return from_mapping(cls, values, where)


def _parts(cls: type[Any], values: Any, where: str) -> list[Any]:
    if not isinstance(values, list | None):
        raise InputError(f"{where} must be a list, got {shown(values)}")
    return [_part(cls, part, f"{where}[{index}]") for index, part in enumerate(values or ())]


# --- the published table ---


def published_values(answers: PublishedTable | None) -> dict[Name, tuple[str, str | None]]:
    """Row name to (value, standard deviation), as printed in the published table.

    If methods have columns of their own, the name ends with the method. Raises InputError if the table cannot be read.
    """
    if answers is None:
        return {}
    path = studies_dir() / "paper" / answers.table
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        rows = [row for row in table if all(row[name] == value for name, value in answers.where.items())]
        keys = answers.key if isinstance(answers.key, list) else [answers.key]
        columns, stds = _by_method(answers.column), _by_method(answers.std)
        return {
            (*(row[key] for key in keys), *method): (row[column], row[stds[method]] if method in stds else None)
            for method, column in columns.items()
            for row in rows
        }
    except OSError as error:
        raise InputError(f"published table {str(path)!r} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise InputError(f"published table {answers.table} has no column {error}") from error


def _by_method(column: str | dict[str, str] | None) -> dict[Name, str]:
    """The end of a row's name to its column: (method,), or () if methods share a column."""
    if isinstance(column, dict):
        return {(method,): name for method, name in column.items()}
    return {} if column is None else {(): column}
