"""The table of a study: its rows, each compared with its reference, and rows over all tasks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from basisadapt.core.grouping import grouped
from basisadapt.diagnostics.diagnostic import DIAGNOSTICS
from basisadapt.study import statistics
from basisadapt.study.outcome import NOT_RUN, Outcome
from basisadapt.study.plan.cells import Row, Study
from basisadapt.study.plan.claims import COMMON, PLATEAU
from basisadapt.study.plan.keys import plain
from basisadapt.study.plan.published import Name, published_values
from basisadapt.study.plan.spec import ALL
from basisadapt.study.plan.tuning import Tuned

# Metrics that are shown as percentages.
PERCENT = ("accuracy", "f1", "matthews", "pearson", "spearman", "energy", "recovered")
PER = " / "  # between two metrics: their quotient
COLUMNS = ("stable_rank.mean", "dc_share.mean", "parameters.trainable")  # the first columns of every table
LINEARITY = ("linear_fit.mean", "nonlinear_share.mean", "nonlinear_share.largest")  # older runs lack these


@dataclass(frozen=True)
class Line:
    """A row with its outcomes.

    row: the row.
    outcomes: seed to the cell's outcome.
    published: value and standard deviation as printed; None if the published table lacks the row or its tasks.
    difference: the difference to the reference of its group.
    p: the adjusted p-value of the difference.
    """

    row: Row
    outcomes: dict[int, Outcome]
    published: tuple[str, str | None] | None
    difference: statistics.Difference | None = None
    p: float | None = None

    @property
    def label(self) -> str:
        """The label of the row."""
        return self.row.label

    @property
    def name(self) -> str:
        """The label without the task."""
        return self.row.name

    @property
    def task(self) -> str:
        """The task of the row."""
        return self.row.task

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its cells, run or not."""
        return tuple(cell.seed for cell in self.row.cells)

    @property
    def values(self) -> dict[int, float]:
        """Seed to headline metric, for finished cells."""
        return {seed: value for seed, o in self.outcomes.items() if (value := o.value) is not None}

    def values_of(self, metric: str | None) -> dict[int, float]:
        """Seed to a metric, or a quotient of two, for finished cells that have it. None is the headline metric."""
        if metric is None:
            return self.values
        if PER in metric:
            over, under = map(self.values_of, metric.split(PER, 1))
            return {seed: value / under[seed] for seed, value in over.items() if under.get(seed)}
        finished = {seed: o.metrics for seed, o in self.outcomes.items() if o.status == "finished"}
        return {seed: metrics[metric] for seed, metrics in finished.items() if metric in metrics}

    def mean_of(self, metric: str | None) -> float | None:
        """The mean of a metric over the finished cells; None if no cell has it."""
        return statistics.mean(list(self.values_of(metric).values()))

    def seeds_by_state(self) -> dict[str, list[int]]:
        """State, such as "failed" or NOT_RUN, to the seeds in it."""
        seen = self.outcomes
        return grouped((seen[seed].status if seed in seen else NOT_RUN, seed) for seed in self.seeds)


@dataclass(frozen=True)
class Across:
    """Rows that differ in their task alone, combined (paper, section B.2).

    name: their label without the task.
    values: task to the mean over seeds.
    published: as in `Line`, for a published table without tasks.
    difference: the difference to the reference paired by task, each task's being its mean over shared seeds.
    p: the adjusted p-value of the difference.
    pairs: the difference paired by task and seed, a statement on these tasks alone.
    """

    name: str
    values: dict[str, float]
    published: tuple[str, str | None] | None = None
    difference: statistics.Difference | None = None
    p: float | None = None
    pairs: statistics.Difference | None = None


@dataclass(frozen=True)
class RowPlateau:
    """The plateau of a row's curve, in octaves of the tuned setting; see `statistics.Plateau`.

    octaves: the plateau of the mean over seeds.
    open: whether it reaches an end of the curve, so that `octaves` is a lower bound.
    by_seed: seed to the plateau of its curve; rows are compared by these.
    open_seeds: the seeds whose plateau is open.
    """

    octaves: float
    open: bool
    by_seed: dict[int, float]
    open_seeds: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """The table of a study.

    study: the study.
    headline: the metric that is compared.
    lines: its rows, in the study's order.
    across: its rows over all tasks; empty for one task.
    at: value of the tuned setting to the table of the rows run at it. Default {}.
    """

    study: Study
    headline: str
    lines: tuple[Line, ...]
    across: tuple[Across, ...]
    at: Mapping[float, Table] = field(default_factory=dict)

    @functools.cached_property
    def every_line(self) -> list[Line]:
        """The lines, and the lines in `at`, each cell once.

        A line that has chosen no value yet stands for its first one, whose cells a line in `at` may have run.
        """
        at = {line.row.cells[0].key: line for table in self.at.values() for line in table.lines}
        known = [line for line in self.lines if line.outcomes or line.row.cells[0].key not in at]
        own = {cell.key for line in known for cell in line.row.cells}
        return [*known, *(line for key, line in at.items() if key not in own)]

    @property
    def has_failures(self) -> bool:
        """Whether a cell failed or diverged."""
        return any({"failed", "diverged"} & line.seeds_by_state().keys() for line in self.every_line)

    @functools.cached_property
    def percent(self) -> bool:
        """Whether the headline metric is shown as a percentage."""
        values = [value for line in self.every_line for value in line.values.values()]
        return any(word in self.headline for word in PERCENT) and all(abs(value) <= 1 for value in values)

    @property
    def beside(self) -> dict[float, Table]:
        """The tables whose columns this one also shows.

        These are the tables at the values that `tune.at` lists; for a whole curve, the one at `tune.common`. The only
        value of a grid is left out, since its table is this one.
        """
        rule = self.study.spec.tune
        if rule is None:
            return {}
        shown = (rule.common,) if rule.at == ALL else rule.values
        return {value: self.at[value] for value in self.at if value in shown and rule.grid[rule.setting] != [value]}

    def where(self, at: float | str | None) -> Table:
        """The table at a value of the tuned setting, "common" for `tune.common`; an empty one if there is none.

        at: None is this table.
        """
        if at is None:
            return self
        return self.at.get(self._value(at), dataclasses.replace(self, lines=(), across=(), at={}))

    def place(self, at: float | str) -> str:
        """The label of a value of the tuned setting: train.lr=0.0001."""
        return f"{self.setting}={plain(self._value(at))}"

    @property
    def setting(self) -> str:
        """The tuned setting without "adapter."; "" if nothing is tuned."""
        return self.study.spec.tune.setting.removeprefix("adapter.") if self.study.spec.tune else ""

    def _value(self, at: float | str) -> float:
        rule = self.study.spec.tune
        if at == COMMON and rule is not None and rule.common is not None:
            return rule.common
        return float(at)

    def curve(self, line: Line) -> dict[float, Line]:
        """Value of the tuned setting to the same row at it."""
        return {value: table._labelled[line.label] for value, table in self.at.items() if line.label in table._labelled}

    def plateau(self, line: Line) -> RowPlateau | None:
        """The octaves of the tuned setting within one point of the best of a row's curve, see `statistics.plateau`.

        A point is 0.01 of a metric shown as a percentage, else 1. A value at which a run diverged counts as worst. Only
        seeds whose cells have all ended count; None for no seed.
        """
        curve, point = self.curve(line), 0.01 if self.percent else 1.0
        by_seed = {seed: _scores(curve, seed) for seed in line.seeds}
        ended = {seed: scores for seed, scores in by_seed.items() if scores is not None}
        means = {x: math.fsum(scores[x] for scores in ended.values()) / len(ended) for x in curve} if ended else {}
        whole = statistics.plateau(means, point)
        found = {seed: statistics.plateau(scores, point) for seed, scores in ended.items()}
        known = {seed: one for seed, one in found.items() if one is not None}
        if whole is None:
            return None
        widths = {seed: one.octaves for seed, one in known.items()}
        return RowPlateau(whole.octaves, whole.open, widths, tuple(seed for seed, one in known.items() if one.open))

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The metrics shown in addition to the headline metric."""
        linearity = (name for name in LINEARITY if any(line.values_of(name) for line in self.every_line))
        diagnostics = (f"{name}.mean" for name in DIAGNOSTICS)
        return tuple(dict.fromkeys((*COLUMNS, *linearity, *diagnostics, *self.study.spec.columns)))

    @property
    def run_ids(self) -> list[str]:
        """The MLflow runs behind the table."""
        return [o.run_id for line in self.lines for o in line.outcomes.values() if o.done]

    def values(self, label: str, metric: str | None) -> Mapping[int, float] | Mapping[str, float]:
        """Seed to value of the row `label`, or task to mean of the rows of that name; empty if there is neither.

        With one task, a name is a row. metric: None is the headline metric.
        """
        lines = self._named(label)
        by_task = {line.task: self._values(line, metric) for line in lines}
        if len(lines) == 1:
            return by_task[lines[0].task]
        means = {task: statistics.mean(list(values.values())) for task, values in by_task.items()}
        return {task: value for task, value in means.items() if value is not None}

    def _values(self, line: Line, metric: str | None) -> dict[int, float]:
        if metric != PLATEAU:
            return line.values_of(metric)
        plateau = self.plateau(line)
        return plateau.by_seed if plateau else {}

    def open_plateaus(self, label: str) -> list[str]:
        """The rows with this label or name that have an open plateau on any seed."""
        found = {line.label: self.plateau(line) for line in self._named(label)}
        return [name for name, plateau in found.items() if plateau is not None and plateau.open_seeds]

    def published(self, label: str) -> str | None:
        """The published mean of the row `label`, or of the rows of that name over all tasks."""
        lines = self._named(label)
        printed = lines if len(lines) == 1 else [row for row in self.across if row.name == label]
        return next((row.published[0] for row in printed if row.published), None)

    def _named(self, label: str) -> list[Line]:
        return [self._labelled[label]] if label in self._labelled else self._by_name.get(label, [])

    @functools.cached_property
    def _labelled(self) -> dict[str, Line]:
        return {line.label: line for line in reversed(self.lines)}

    @functools.cached_property
    def _by_name(self) -> dict[str, list[Line]]:
        return by_name(self.lines)

    def leading(self, names: int) -> list[Line]:
        """The lines of at most so many names, in their order.

        First come the names in claims, then those with the greatest means over tasks, each with its reference.
        """
        if len(self._by_name) <= names:
            return list(self.lines)
        labels = (label for claim in self.study.spec.claims for label in claim.labels)
        claimed = (line.name for label in labels for line in self._named(label))
        references = {line.row.group: line.name for line in reversed(self.lines) if line.row.is_reference}
        chosen: dict[str, None] = {}
        for name in (*claimed, *sorted(self._by_name, key=self._worth, reverse=True)):
            compared = (references.get(line.row.group, name) for line in self._by_name[name])
            chosen.update(dict.fromkeys((name, *compared)))
            if len(chosen) >= names:
                break
        kept = set(list(chosen)[:names])
        return [line for line in self.lines if line.name in kept]

    def _worth(self, name: str) -> float:
        means = [mean for line in self._by_name[name] if (mean := line.mean_of(None)) is not None]
        return math.fsum(means) / len(means) if means else -math.inf


def by_name(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Name to its lines, which differ in their task."""
    return grouped((line.name, line) for line in lines)


def _scores(curve: Mapping[float, Line], seed: int) -> dict[float, float] | None:
    """Value of the tuned setting to a seed's score, −∞ if it diverged; None if a cell has failed or not ended."""
    scores = {}
    for x, line in curve.items():
        if seed in line.values:
            scores[x] = line.values[seed]
        elif seed in line.outcomes and line.outcomes[seed].status == "diverged":
            scores[x] = -math.inf
        else:
            return None
    return scores


def build_table(study: Study, outcomes: Mapping[str, Outcome], at: Mapping[float, Table] | None = None) -> Table:
    """The table of a study. outcomes: cell key to outcome. at: see `Table`."""
    published = published_values(study.spec.answers)
    tells_tasks = "task" in study.spec.sweep or len({row.task for row in study.rows}) == 1
    lines = [_line(row, outcomes, published if tells_tasks else {}) for row in study.rows]
    references = {line.row.group: line for line in reversed(lines) if line.row.is_reference}
    lines = [_compared(line, references.get(line.row.group)) for line in lines]
    adjusted = statistics.holm([line.difference.p if line.difference else None for line in lines])
    lines = [dataclasses.replace(line, p=p) for line, p in zip(lines, adjusted, strict=True)]
    across = _across(lines, references, {} if tells_tasks else published)
    table = Table(study, "", tuple(lines), across, at or {})
    headlines = dict.fromkeys(o.headline for line in table.every_line for o in line.outcomes.values() if o.headline)
    return dataclasses.replace(table, headline=" / ".join(headlines) or "result")


def tuned_table(tuned: Tuned, outcomes: Mapping[str, Outcome]) -> Table:
    """The table of the rows with their choices; its `at` has the tables at `Tune.values`."""
    studies = {value: Study(tuned.tuning.spec, rows) for value, rows in tuned.tuning.at.items()}
    at = {value: build_table(study, outcomes) for value, study in studies.items()}
    return build_table(tuned.study, tuned.seen(outcomes), at)


def _line(row: Row, outcomes: Mapping[str, Outcome], published: Mapping[Name, tuple[str, str | None]]) -> Line:
    return Line(
        row=row,
        outcomes={cell.seed: outcomes[cell.key] for cell in row.cells if cell.key in outcomes},
        published=None if row.published is None else published.get(row.published),
    )


def _compared(line: Line, reference: Line | None) -> Line:
    if reference is None or line is reference:
        return line
    return dataclasses.replace(line, difference=statistics.difference(line.values, reference.values))


def _across(
    lines: list[Line], references: Mapping[tuple[Any, ...], Line], published: Mapping[Name, tuple[str, str | None]]
) -> tuple[Across, ...]:
    if len({line.task for line in lines}) < 2:
        return ()
    found = []
    for name, same in by_name(lines).items():
        by_task = {line.task: line.mean_of(None) for line in same}
        gains = {line.task: line.difference.mean for line in same if line.difference is not None}
        difference = statistics.difference(gains, dict.fromkeys(gains, 0.0))
        compared = [(line, references[line.row.group]) for line in same if line.difference is not None]
        ours, theirs = _by_task_and_seed(a for a, _ in compared), _by_task_and_seed(b for _, b in compared)
        means = {task: mean for task, mean in by_task.items() if mean is not None}
        printed = None if same[0].row.published is None else published.get(same[0].row.published)
        found.append(Across(name, means, printed, difference, pairs=statistics.difference(ours, theirs)))
    adjusted = statistics.holm([line.difference.p if line.difference else None for line in found])
    return tuple(dataclasses.replace(line, p=p) for line, p in zip(found, adjusted, strict=True))


def _by_task_and_seed(lines: Iterable[Line]) -> dict[tuple[str, int], float]:
    return {(line.task, seed): value for line in lines for seed, value in line.values.items()}
