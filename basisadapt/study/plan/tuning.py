"""Tuning: trials of the same values of some settings for every row, which is then run with its best ones.

Trials are cells with two differences. Their seeds are none of the study's, and they are evaluated on training rows that
they do not train on (`train.validation`); a task that draws its rows draws others for other seeds. So nothing is chosen
on the reported rows. `tune.at` and `tune.common` also run every row at given values, with the study's seeds and on its
held-out rows. A cell that is both a choice and at such a value runs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from basisadapt.core.errors import InputError
from basisadapt.core.settings import from_mapping
from basisadapt.study import statistics
from basisadapt.study.outcome import NOT_RUN, Outcome
from basisadapt.study.plan.cells import Cell, Point, Row, Study, check_count, on_own_data, product, resolve
from basisadapt.study.plan.changes import split_changes
from basisadapt.study.plan.keys import full_key, plain
from basisadapt.study.plan.spec import RULE, TUNE, StudySpec, Tune, axes_in

OTHER_SEEDS, HELD_BACK = (7,), 0.2  # defaults for a rule from the command line: seeds, share of rows
ENDED = ("finished", "diverged", "failed")  # final states of a trial; a killed one runs again


@dataclass(frozen=True)
class Candidate:
    """A point of the grid for one row.

    point: the values of the tuned settings.
    trials: the cells that try them.
    row: the row that runs if it is chosen.
    """

    point: Point
    trials: tuple[Cell, ...]
    row: Row

    @property
    def name(self) -> str:
        """ "train.lr=0.001"."""
        return _named(self.point)


@dataclass(frozen=True)
class CandidateResult:
    """The result of a candidate.

    candidate: the candidate.
    state: "finished", or the state of a trial that is not.
    value: the mean of what `Tune.by` names over the trials; None if a trial has not finished or lacks the metric.
    """

    candidate: Candidate
    state: str
    value: float | None


@dataclass(frozen=True)
class RowTuning:
    """The candidates of one row, and the best of them.

    tried: the results, in the order of the grid.
    least: whether the least value is best, not the greatest. Default False.

    Candidates that diverged or failed count as worst. The first of equal values is chosen.
    """

    tried: tuple[CandidateResult, ...]
    least: bool = False

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate; None if none has finished, or one is still to be tried."""
        if len(self.tried) == 1:
            return self.tried[0].candidate
        values = [found.value for found in self.tried if found.value is not None]
        if self.is_open or not values:
            return None
        best = min(values) if self.least else max(values)
        return next(found.candidate for found in self.tried if found.value == best)

    @property
    def is_open(self) -> bool:
        """Whether a candidate is still to be tried."""
        return any(found.state not in ENDED for found in self.tried)

    @property
    def row(self) -> Row:
        """The row with its choice; with the first candidate as long as there is none."""
        return (self.best or self.tried[0].candidate).row

    @property
    def edges(self) -> list[str]:
        """The settings whose choice is the least or greatest number of the grid: a better value may lie beyond it."""
        found = []
        for key, value in self.best.point if self.best else ():
            numbers = [dict(tried.candidate.point)[key] for tried in self.tried]
            ordered = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
            if ordered and key in self.row.cells[0].settings and value in (min(numbers), max(numbers)):
                found.append(key)
        return found


@dataclass(frozen=True)
class Tuning:
    """The rows of a study with their candidates.

    spec: the study's spec, its `tune` after all changes.
    candidates: for each row its candidates, in the order of the grid; one each if nothing is tuned.
    at: value in `Tune.values` to the rows at it.
    """

    spec: StudySpec
    candidates: tuple[tuple[Candidate, ...], ...]
    at: Mapping[float, tuple[Row, ...]] = field(default_factory=dict)

    @property
    def trials(self) -> tuple[Cell, ...]:
        """The cells that run before the choice."""
        return tuple(cell for candidates in self.candidates for one in candidates for cell in one.trials)

    @property
    def rows_at(self) -> tuple[Row, ...]:
        """Every row at every value in `Tune.values`."""
        return tuple(row for rows in self.at.values() for row in rows)

    @property
    def possible_cells(self) -> list[Cell]:
        """The cells for every possible choice, some of them more than once."""
        rows = [candidate.row for candidates in self.candidates for candidate in candidates]
        return [*self.trials, *(cell for row in (*rows, *self.rows_at) for cell in row.cells)]

    def choose(self, outcomes: Mapping[str, Outcome]) -> Tuned:
        """The choices by the recorded outcomes, cell key to outcome."""
        by_loss = self.spec.tune is not None and self.spec.tune.by == "loss"
        tried = (tuple(_result_of(one, outcomes, by_loss) for one in candidates) for candidates in self.candidates)
        return Tuned(self, tuple(RowTuning(candidates, least=by_loss) for candidates in tried))


@dataclass(frozen=True)
class Tuned:
    """A study with the choices of its tuning, row by row."""

    tuning: Tuning
    choices: tuple[RowTuning, ...]

    @property
    def study(self) -> Study:
        """Every row with its choice."""
        return Study(self.tuning.spec, tuple(choice.row for choice in self.choices))

    @property
    def planned(self) -> Study:
        """Every row with its choice, and every row at `Tune.values`: all that runs except trials."""
        return Study(self.tuning.spec, (*self.study.rows, *self.tuning.rows_at))

    @property
    def cells(self) -> list[Cell]:
        """Every cell once: first the trials, then the others."""
        once: dict[str, Cell] = {}
        for cell in (*self.tuning.trials, *self.planned.cells):
            once.setdefault(cell.key, cell)
        return list(once.values())

    @property
    def chosen(self) -> Study:
        """The rows of `planned` that can run: those with a choice, and those at `Tune.values`."""
        rows = (choice.row for choice in self.choices if choice.best)
        return Study(self.tuning.spec, (*rows, *self.tuning.rows_at))

    @property
    def has_failures(self) -> bool:
        """Whether a trial failed or diverged."""
        return any(tried.state in ("failed", "diverged") for choice in self.choices for tried in choice.tried)

    def seen(self, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
        """The outcomes as a table shows them: a row without a choice has not run, or failed if all candidates did."""
        shown = dict(outcomes)
        for choice in self.choices:
            reason = "tuning: " + ", ".join(f"{tried.candidate.name} {tried.state}" for tried in choice.tried)
            for cell in choice.row.cells if choice.best is None else ():
                shown.pop(cell.key, None)
                if not choice.is_open:
                    shown[cell.key] = Outcome("", cell.key, "failed", "", {}, (), reason)
        return shown


def _result_of(candidate: Candidate, outcomes: Mapping[str, Outcome], by_loss: bool) -> CandidateResult:
    found = [outcomes.get(cell.key) for cell in candidate.trials]
    states = [outcome.status if outcome else NOT_RUN for outcome in found]
    unfinished = [state for state in states if state not in ENDED] or [state for state in states if state != "finished"]
    if unfinished:
        return CandidateResult(candidate, unfinished[0], None)
    ended = [outcome for outcome in found if outcome is not None]
    values = [outcome.metrics.get("eval_loss") if by_loss else outcome.value for outcome in ended]
    known = [value for value in values if value is not None]
    return CandidateResult(candidate, "finished", statistics.mean(known) if len(known) == len(values) else None)


def resolve_tuning(
    spec: StudySpec, *, preset: str = "quick", changes: Sequence[str] = (), seeds: Sequence[int] | None = None
) -> Tuning:
    """`resolve` with the candidates of every row; a candidate is the study with each value of its point `--set`.

    Precedence of `tune`: spec < preset < changes ("tune.train.lr=1e-3,1e-2"). A grid of one point needs no trial.
    Raises InputError, also for a setting that is both tuned and set, and for tuning seeds that are the study's.
    """
    spec = replace(spec, tune=_rule(spec, preset, changes, seeds))
    grid = spec.tune.grid if spec.tune else {}
    values = spec.tune.values if spec.tune else []
    points = product(grid.items())
    by_point: list[list[Candidate]] = []
    for point in points:
        changed = _changed(changes, point)
        rows = resolve(spec, preset=preset, changes=changed, seeds=seeds).rows
        check_count((len(points) + len(values)) * sum(len(row.cells) for row in rows))
        trials: list[tuple[Cell, ...]] = [() for _ in rows]
        if spec.tune is not None and len(points) > 1:
            _check_seeds(spec.tune.seeds, rows)
            if spec.tune.validation is None:
                _check_drawn(rows)
            else:
                changed.append(f"train.validation={spec.tune.validation}")
            tried = resolve(spec, preset=preset, changes=changed, seeds=spec.tune.seeds).rows
            labels = (f"{row.label}, tuning {_named(point)}" for row in rows)
            trials = [row.with_cells(row=label).cells for row, label in zip(tried, labels, strict=True)]
        by_point.append([Candidate(point, cells, row) for row, cells in zip(rows, trials, strict=True)])
    at: dict[float, tuple[Row, ...]] = {}
    for value in values:
        only = [(key, value) for key in grid]
        rows = resolve(spec, preset=preset, changes=_changed(changes, only), seeds=seeds).rows
        # A label of their own tells these cells apart in the record.
        at[value] = tuple(row.with_cells(row=f"{row.label}, {_named(only)}") for row in rows)
    _check_values([[one.row for one in of_row] for of_row in zip(*by_point, strict=True)], grid)
    _check_values(list(zip(*at.values(), strict=True)), dict.fromkeys(grid, values))
    spec = on_own_data(spec, [one.row for one in by_point[0]])
    return Tuning(spec, tuple(zip(*by_point, strict=True)), at)


def _changed(changes: Sequence[str], point: Iterable[tuple[str, Any]]) -> list[str]:
    return [*changes, *(f"{key}={plain(value)}" for key, value in point)]


def _named(point: Iterable[tuple[str, Any]]) -> str:
    """ "train.lr=0.001"."""
    return ", ".join(f"{key.removeprefix('adapter.')}={plain(value)}" for key, value in point)


def _rule(spec: StudySpec, preset: str, changes: Sequence[str], seeds: Sequence[int] | None) -> Tune | None:
    """`tune` after all changes, its grid by full keys; the defaults for a study that has none."""
    split = split_changes(changes)
    changed = {**axes_in(spec.presets.get(preset, {}), TUNE), **split.tune}
    own = {name: changed.pop(name) for name in RULE if name in changed}
    rule = spec.tune
    if rule is None:
        if own and not changed:
            raise InputError(
                f"study {spec.name!r} tunes nothing, so that {TUNE}{next(iter(own))} means nothing without a setting, "
                f"such as {TUNE}train.lr=1e-3,1e-2"
            )
        if not changed:
            return None
        drawn = all(map(_is_drawn, resolve(spec, preset=preset, changes=changes, seeds=seeds).rows))
        rule = Tune(grid={}, seeds=OTHER_SEEDS, validation=None if drawn else HELD_BACK)
    grid = {full_key(name): values for name, values in {**rule.grid, **changed}.items()}
    for key in grid:
        if not key.startswith(("adapter.", "train.")):
            raise InputError(f"{TUNE}{key}: only settings of the adapter and of training are tuned")
        if key in split.overrides:
            raise InputError(f"{key} is tuned; --set {TUNE}{key}={plain(split.overrides[key])} tries that value only")
    return from_mapping(Tune, {**asdict(rule), **own, "grid": grid}, "tune")


def _check_seeds(seeds: Sequence[int], rows: Sequence[Row]) -> None:
    shared = sorted({cell.seed for row in rows for cell in row.cells} & set(seeds))
    if shared or not seeds:
        problem = f"{shared[0]} is one of the study's" if shared else "there are none"
        raise InputError(f"tune.seeds must be seeds that no row is reported with: {problem}")


def _is_drawn(row: Row) -> bool:
    """Whether other seeds draw other evaluated rows."""
    from basisadapt import tasks

    config = row.cells[0].config
    return isinstance(tasks.find(config.task, config.data), tasks.SeededTask)


def _check_drawn(rows: Sequence[Row]) -> None:
    """Raise InputError for a row whose trials would be evaluated on its reported rows."""
    for row in rows:
        if not _is_drawn(row):
            raise InputError(
                f"tune.validation must be a share of the training rows for task {row.task!r}, whose evaluated rows "
                "are the same for every seed"
            )


def _check_values(rows: Iterable[Sequence[Row]], grid: Mapping[str, Sequence[Any]]) -> None:
    """Raise InputError for a row that sets a tuned setting. rows: each at every point of the grid."""
    tuned = [key for key, values in grid.items() if len(values) > 1]
    for same in rows if tuned else ():
        settings = [row.cells[0].settings for row in same]
        for key in tuned:
            if key in settings[0] and len({plain(found[key]) for found in settings}) == 1:
                raise InputError(f"row {same[0].label!r} sets {key}, which is tuned")
