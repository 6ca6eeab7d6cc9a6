"""The Optuna study of a study's cells: one trial per run of a cell."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from basisadapt.core.errors import InputError, one_line
from basisadapt.study.outcome import Outcome
from basisadapt.study.plan.cells import Cell
from basisadapt.study.record.stores import make_database, sqlite_file, with_retries

RUN = "run"  # the user attribute of a trial that names its MLflow run


class Trials:
    """The trials of a study's cells, in the Optuna study of its name, created if missing.

    storage: the URL of Optuna's store.
    name: the name of the study.
    values: parameter to its choices, see `parameter_values`. Default None, no parameters.

    The parameters of a trial are the settings that distinguish its cell, so that Optuna's dashboard and importances
    show them; its user attributes have the rest. Optuna never changes the choices of a parameter: if the study has
    other choices, its trials go to an Optuna study whose name ends in a hash of them. MLflow decides which cells are
    done; trials mirror it. Raises InputError if the store cannot be opened.
    """

    def __init__(self, storage: str, name: str, values: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._space = _space(values or {})
        self._study = _study_of(storage, name, self._space)
        self._storage: BaseStorage = self._study._storage
        self._study_id: int = self._study._study_id

    def ask(self, cell: Cell, run_id: str) -> int:
        """Start the trial of a cell's run, atomically. Returns its number."""
        trial_id = start_trial(self._study, self._trial(cell, TrialState.RUNNING, None, {RUN: run_id}))
        return self._storage.get_trial_number_from_id(trial_id)

    def tell(self, number: int, status: str, value: float | None = None) -> None:
        """End a trial: complete with a value, failed without. A trial that another process has ended stays as it is."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "status", status)
            self._study.tell(number, value, state=_state(value), skip_if_finished=True)

    def close_orphans(
        self, running: Callable[[], Collection[str]], record: Callable[[], Mapping[str, Outcome]]
    ) -> None:
        """Close the trials whose runs are dead, with the value of the cell if it is from their run.

        running: see `orphans_of`.
        record: returns the recorded outcomes; called only if there are trials to close.
        """
        orphans = orphans_of(self._study, running)
        outcomes = record() if orphans else {}
        for orphan in orphans:
            outcome = outcomes.get(orphan.user_attrs.get("cell", ""))
            own = outcome is not None and orphan.user_attrs.get(RUN, outcome.run_id) == outcome.run_id
            value = outcome.value if outcome is not None and own else None
            self._study.tell(orphan.number, value, state=_state(value), skip_if_finished=True)

    def follow(self, cells: Iterable[Cell], outcomes: Mapping[str, Outcome]) -> None:
        """Add the missing trials of done cells."""
        known = {
            trial.user_attrs.get("cell")
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state in (TrialState.RUNNING, TrialState.COMPLETE) or trial.user_attrs.get("status") == "diverged"
        }
        for cell in cells:
            outcome = outcomes.get(cell.key)
            if outcome is not None and outcome.done and cell.key not in known:
                done = self._trial(cell, _state(outcome.value), outcome.value, {"status": outcome.status})
                self._study.add_trial(done)

    def _trial(self, cell: Cell, state: TrialState, value: float | None, attributes: Mapping[str, str]) -> FrozenTrial:
        """The trial of a cell. Values outside the choices, as in a search, are left out of its parameters."""
        values = {key: _choice(value) for key, value in cell.parameters.items() if key in self._space}
        params = {key: value for key, value in values.items() if value in self._space[key].choices}
        return create_trial(
            state=state,
            value=value,
            params=params,
            distributions={key: self._space[key] for key in params},
            user_attrs={
                "cell": cell.key,
                "row": cell.row,
                "seed": cell.seed,
                "config": json.dumps(cell.config.to_mapping(), sort_keys=True),
                **attributes,
            },
        )


def _space(values: Mapping[str, Sequence[Any]]) -> dict[str, CategoricalDistribution]:
    return {key: CategoricalDistribution([_choice(value) for value in known]) for key, known in values.items() if known}


def _choice(value: Any) -> Any:
    """The value of a setting as Optuna accepts it."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def _study_of(storage: str, name: str, space: Mapping[str, CategoricalDistribution]) -> Study:
    """The Optuna study `name`, or if that has other choices, one for these. Raises InputError."""
    study = open_study(storage, name)
    known = {key: where for trial in study.get_trials(deepcopy=False) for key, where in trial.distributions.items()}
    if all(known.get(key, where) == where for key, where in space.items()):
        return study
    choices = json.dumps({key: where.choices for key, where in sorted(space.items())})
    return open_study(storage, f"{name} grid {hashlib.sha256(choices.encode()).hexdigest()[:8]}")


def open_study(storage: str, name: str) -> Study:
    """The Optuna study `name`, which maximizes, created if missing. Raises InputError if the store cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Two drivers may write to one file: wait for the lock.
    patience = {"connect_args": {"timeout": 60}} if sqlite_file(storage) else {}

    def tables(url: str) -> RDBStorage:
        return RDBStorage(url, engine_kwargs=dict(patience))

    try:
        make_database(storage, lambda url: tables(url).engine.dispose())
        database = with_retries(storage, lambda: tables(storage))
        return optuna.create_study(storage=database, study_name=name, direction="maximize", load_if_exists=True)
    except InputError:
        raise
    except Exception as error:  # SQLAlchemy's or a database driver's
        raise InputError(f"--storage {storage!r} cannot be opened: {one_line(error)}") from error


def start_trial(study: Study, trial: FrozenTrial) -> int:
    """Write a trial that runs, whole: a process that is killed leaves all of it or nothing. Returns its id."""
    # As optuna.Study.add_trial does, which does not return the id.
    return study._storage.create_new_trial(study._study_id, template_trial=trial)


def orphans_of(study: Study, running: Callable[[], Collection[str]]) -> list[FrozenTrial]:
    """The open trials whose drivers are dead: their MLflow runs are not open.

    running: returns the ids of the open runs; called only if there are open trials, and after these were read, since a
    run begins before its trials.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    alive = running() if trials else ()
    return [trial for trial in trials if trial.user_attrs.get(RUN) not in alive]


def _state(value: float | None) -> TrialState:
    return TrialState.FAIL if value is None else TrialState.COMPLETE
