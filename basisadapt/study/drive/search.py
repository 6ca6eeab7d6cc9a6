"""Search: an Optuna study proposes configurations, and the cells of each are run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna import load_study
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState, create_trial

from basisadapt.core.command import tell
from basisadapt.core.errors import InputError, require
from basisadapt.study import statistics
from basisadapt.study.drive.engine import make_ready, write_report
from basisadapt.study.drive.invocation import Invocation
from basisadapt.study.drive.paths import StudyPaths, check_paths
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Row, Study, resolve
from basisadapt.study.plan.changes import split_changes
from basisadapt.study.plan.space import Space, edges, search_space, suggest
from basisadapt.study.plan.spec import SWEEP, VARIANT, ExtraRow, StudySpec
from basisadapt.study.record.record import Record
from basisadapt.study.record.trials import RUN, open_study, orphans_of, start_trial
from basisadapt.study.report.report import EndedTrial, Report, SearchResult, make_report
from basisadapt.study.report.table import build_table
from basisadapt.training.execution.executor import Executor

MAX_SHOWN = 5  # trials in the table, in addition to the reference
MIN_FINISHED = 10  # trials, before importances are estimated
TASKS = f"{SWEEP}task"


@dataclass(frozen=True)
class Search:
    """A search. A trial is one configuration on every task with every seed; its value is the mean headline metric.

    spec: the study.
    preset: the preset of its runs.
    changes: "key=value", as `--set` takes them.
    seeds: the seeds of every trial, None for the study's; the first one also seeds the sampler.
    sampler: "tpe" or "random".
    trials: the number of trials, at least 1, those that have ended included.
    at_once: the number of trials that are proposed together, at least 1. Default 1.

    Raises InputError for numbers below 1.
    """

    spec: StudySpec
    preset: str
    changes: Sequence[str]
    seeds: Sequence[int] | None
    sampler: str
    trials: int
    at_once: int = 1

    def __post_init__(self) -> None:
        require(self.trials >= 1, "--trials", self.trials, "at least 1")
        require(self.at_once >= 1, "--at-once", self.at_once, "at least 1")

    def rows(self, label: str, settings: Mapping[str, Any]) -> tuple[Row, ...]:
        """The rows of a trial, one per task: the study's base with `settings` over it. Raises InputError."""
        tasks = {TASKS: self.spec.sweep["task"]} if "task" in self.spec.sweep else {}
        presets = {
            name: {**tasks, **{key: value for key, value in overrides.items() if _stays(key)}}
            for name, overrides in {"quick": {}, **self.spec.presets}.items()
        }
        alone = ExtraRow(label=label, set=dict(settings))
        spec = dataclasses.replace(self.spec, sweep={}, beside=(alone,), reference=None, presets=presets)
        changes = [change for change in self.changes if _stays(change.partition("=")[0])]
        return resolve(spec, preset=self.preset, changes=changes, seeds=self.seeds).rows

    def reference(self) -> list[Row]:
        """The reference rows of the study, if it has any."""
        study = resolve(self.spec, preset=self.preset, changes=self.changes, seeds=self.seeds)
        return [row for row in study.rows if row.is_reference]

    def space(self) -> Space:
        """The space of the search. Raises InputError for a study with variants and no `search`."""
        axes = {**self.spec.sweep, **split_changes(self.changes).sweep}
        axes.pop("task", None)
        if axes.pop(VARIANT, None) and not self.spec.search:
            raise InputError(f"study {self.spec.name!r} has variants, which a search cannot vary: give it `search`")
        return search_space(self.spec, axes, self.rows("base", {})[0].cells[0].config)

    def study(self, rows: Sequence[Row]) -> Study:
        """The given rows as a study without published table and claims."""
        title = f"{self.spec.title}: search"
        return Study(dataclasses.replace(self.spec, title=title, answers=None, claims=()), tuple(rows))


def _stays(key: str) -> bool:
    """Whether a key of a preset or a change applies to trials; of the axes, only `task` does."""
    return key == TASKS or not key.startswith(SWEEP)


def run_search(search: Search, place: StudyPaths, tags: Mapping[str, str], executor: Executor) -> Report:
    """Run the missing trials, and report. Finished cells never run again.

    Raises InputError before anything is recorded, and KeyboardInterrupt after closing the interrupted trials.
    """
    check_paths(place)
    ends = [(f"{key}={value}", {key: value}) for edge in edges(search.space()) for key, value in edge.items()]
    rows = [row for label, settings in ends for row in search.rows(label, settings)]
    make_ready([row.cells[0] for row in [*rows, *search.reference()]], place.data_dir, executor)
    reference = [cell for row in search.reference() for cell in row.cells]
    with Invocation(search.spec, reference, place, tags, executor) as invocation:
        driver = SearchDriver(place.optuna_url, search)
        driver.close_orphans(invocation.running)
        invocation.run(reference)
        while len(driver.ended) < search.trials:
            driver.step(invocation)
        report = _report(search, driver, invocation.outcomes)
        invocation.end(report)
    return report


def read_search(search: Search, place: StudyPaths) -> Report:
    """The report of a search from the record; runs nothing. Raises InputError if nothing of it is recorded."""
    check_paths(place)
    outcomes = Record.read(place.tracking_uri, search.spec.name, search.spec.metrics)
    driver = SearchDriver(place.optuna_url, search) if outcomes else None
    if driver is None or not driver.ended:
        raise InputError(f"nothing of this search of {search.spec.name!r} is recorded in {place.optuna_url!r}")
    report = _report(search, driver, outcomes)
    write_report(report, place)
    return report


def _report(search: Search, driver: SearchDriver, outcomes: Mapping[str, Outcome]) -> Report:
    found = driver.found()
    best = [row for trial in found.ranked[:MAX_SHOWN] for row in search.rows(trial.label, trial.params)]
    return make_report(build_table(search.study([*best, *search.reference()]), outcomes), found)


class SearchDriver:
    """The Optuna study of a search.

    Its name ends in a hash of base configuration, seeds, space and sampler, so its trials are comparable. The first
    seed and the trial's number seed the sampler anew for each trial, so an interrupted search resumes with the same
    proposals.
    """

    def __init__(self, storage: str, search: Search) -> None:
        self._search, self._space = search, search.space()
        base = search.rows("base", {})
        self._seeds = tuple(cell.seed for cell in base[0].cells)
        keys = [row.cells[0].key for row in base]
        same = [keys, self._seeds, {key: str(where) for key, where in self._space.items()}, search.sampler]
        digest = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8]
        self._study = open_study(storage, f"{search.spec.name} search {digest}")

    @property
    def ended(self) -> list[EndedTrial]:
        """The trials that have ended, without the killed ones."""
        trials = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()]
        return [
            EndedTrial(trial.user_attrs["number"], trial.user_attrs["status"], trial.value, trial.params)
            for trial in trials
            if trial.user_attrs.get("status", "killed") != "killed"
        ]

    def close_orphans(self, running: Callable[[], Collection[str]]) -> None:
        """Close the open trials of dead invocations. running: see `orphans_of`."""
        for trial in orphans_of(self._study, running):
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def step(self, invocation: Invocation) -> None:
        """Run the next trials: ask Optuna, run their cells, tell Optuna."""
        first = len(self.ended) + 1
        last = min(first + self._search.at_once - 1, self._search.trials)
        asked: dict[int, Trial] = {}
        try:
            for number in range(first, last + 1):
                asked[number] = self._ask(number, invocation.run_id)
            rows = {n: self._search.rows(f"trial {n}", trial.params) for n, trial in asked.items()}
            for number, trial in asked.items():
                trial.set_user_attr("cells", [cell.key for row in rows[number] for cell in row.cells])
            outcomes = invocation.run([cell for same in rows.values() for row in same for cell in row.cells])
        except BaseException:
            for trial in asked.values():
                self._tell(trial, "killed", None)
            raise
        for number, trial in asked.items():
            ended = [outcomes[cell.key] for row in rows[number] for cell in row.cells]
            states = [outcome.status for outcome in ended]
            status = next((state for state in ("failed", "diverged", "killed") if state in states), "finished")
            values = [outcome.value for outcome in ended if outcome.value is not None]
            value = statistics.mean(values) if status == "finished" else None
            self._tell(trial, status, value)
            shown = status if value is None else f"{value:.4f}"
            tell(f"trial {number} of {self._search.trials}: {shown}")

    def _ask(self, number: int, run_id: str) -> Trial:
        # Not Study.ask, whose trial would be nobody's at first. A Study reads the trials for its sampler once.
        study = load_study(
            study_name=self._study.study_name, storage=self._study._storage, sampler=self._sampler(number)
        )
        attributes = {RUN: run_id, "number": number, "status": "killed"}  # unless it ends otherwise
        started = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        trial = Trial(study, start_trial(study, started))
        for key, where in self._space.items():
            suggest(trial, key, where)
        return trial

    def _tell(self, trial: Trial, status: str, value: float | None) -> None:
        trial.set_user_attr("status", status)
        # TPE ranks a pruned trial among the worst, as a diverged one is, and ignores a failed one.
        state = {"finished": TrialState.COMPLETE, "diverged": TrialState.PRUNED}.get(status, TrialState.FAIL)
        self._study.tell(trial, value, state=state)

    def _sampler(self, number: int) -> BaseSampler:
        seed = random.Random(f"{self._seeds[0]} {number}").getrandbits(32)
        if self._search.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, constant_liar=self._search.at_once > 1)  # to avoid proposals near running trials

    def found(self) -> SearchResult:
        """The result so far."""
        importance, reason = self._importance()
        search = self._search
        return SearchResult(search.sampler, search.trials, self._seeds, self._space, self.ended, importance, reason)

    def _importance(self) -> tuple[dict[str, float], str]:
        """Setting to its importance by fANOVA; if there is none, the reason as the second value."""
        values = [trial.value for trial in self.ended if trial.value is not None]
        if len(values) < MIN_FINISHED:
            needs = f"they need at least {MIN_FINISHED} finished trials, and there are {len(values)}"
            return {}, f"No importances: {needs}."
        if len(set(values)) < 2:
            return {}, "No importances: every trial has the same value."
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        return get_param_importances(self._study, evaluator=FanovaImportanceEvaluator(seed=self._seeds[0])), ""
