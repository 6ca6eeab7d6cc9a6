"""A study as its YAML file states it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from basisadapt.core.errors import InputError, require
from basisadapt.study.plan.claims import Claim
from basisadapt.study.plan.published import PublishedTable

PRESETS = ("smoke", "quick", "gpu", "llm", "encoder", "paper")
SWEEP, TUNE = "sweep.", "tune."  # prefixes of the keys of axes, and of tuned settings
VARIANT = "variant"  # an axis whose values name groups of settings in `given`
ALL = "all"  # tune.at: all values of the grid


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
        check_axes(self.grid, TUNE)
        require(self.by in ("score", "loss"), "tune.by", self.by, "score or loss")
        if self.at is None and self.common is None:
            return
        require(not isinstance(self.at, str) or self.at == ALL, "tune.at", self.at, f"a list of numbers or {ALL}")
        if len(self.grid) != 1:
            raise InputError(f"tune.at and tune.common need one tuned setting, got {', '.join(self.grid) or 'none'}")
        for value in self._listed:
            sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            require(sound, "tune.at and tune.common", value, "numbers above 0")

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


def check_axes(axes: Mapping[str, Any], kind: str) -> None:
    """Raise InputError unless every axis, or tuned setting, has a list of values."""
    for axis, points in axes.items():
        require(isinstance(points, list) and bool(points), f"{kind}{axis}", points, "a list of values")


def axes_in(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The entries of `values` with the prefix `kind`, SWEEP or TUNE, by the name after it."""
    return {name.removeprefix(kind): value for name, value in values.items() if name.startswith(kind)}
