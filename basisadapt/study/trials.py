"""The Optuna side of a study: a trial per run of a cell, asked for before it and told after it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from basisadapt.errors import InputError, one_line
from basisadapt.study.owner import Owner
from basisadapt.study.record import Outcome
from basisadapt.study.stores import make_database, patiently, sqlite_file

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial, TrialState

    from basisadapt.study.cells import Cell


class Trials:
    """The Optuna study called `name`, made if it is new. What a trial stands for is in its user attributes.

    MLflow has the last word on what is done; trials follow it.
    """

    def __init__(self, storage: str, name: str) -> None:
        self._study = open_study(storage, name)

    def ask(self, cell: Cell) -> Trial:
        """Start a trial for `cell`."""
        trial = self._study.ask()
        for name, value in {"owner": str(Owner.me()), **_attributes(cell)}.items():
            trial.set_user_attr(name, value)
        return trial

    def tell(self, trial: Trial, status: str, value: float | None = None) -> None:
        """End a trial: complete with a value, or failed without one."""
        trial.set_user_attr("status", status)
        self._study.tell(trial, value, state=_state(value))

    def close_orphans(self, record: Callable[[], Mapping[str, Outcome]]) -> None:
        """Close the trials of dead processes as the whole record, read where there are any, has their cells."""
        from optuna.trial import TrialState

        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        orphans = [trial for trial in running if is_orphan(trial)]
        outcomes = record() if orphans else {}
        for orphan in orphans:
            outcome = outcomes.get(orphan.user_attrs.get("cell", ""))
            value = outcome.value if outcome else None
            self._study.tell(orphan.number, value, state=_state(value))

    def follow(self, cells: Iterable[Cell], outcomes: Mapping[str, Outcome]) -> None:
        """Add the trials of done cells that Optuna does not know."""
        from optuna.trial import TrialState, create_trial

        known = {
            trial.user_attrs.get("cell")
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state in (TrialState.RUNNING, TrialState.COMPLETE) or trial.user_attrs.get("status") == "diverged"
        }
        for cell in cells:
            outcome = outcomes.get(cell.key)
            if outcome is not None and outcome.done and cell.key not in known:
                attributes = {**_attributes(cell), "status": outcome.status}
                value = outcome.value
                self._study.add_trial(create_trial(state=_state(value), value=value, user_attrs=attributes))


def open_study(storage: str, name: str) -> Study:
    """The Optuna study called `name`, which maximises, made if it is new. Raises InputError."""
    import optuna
    from optuna.storages import RDBStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Two drivers may write to one file: wait for the other rather than fail.
    patience = {"connect_args": {"timeout": 60}} if sqlite_file(storage) else {}

    def tables(url: str) -> RDBStorage:
        return RDBStorage(url, engine_kwargs=dict(patience))

    try:
        make_database(storage, lambda url: tables(url).engine.dispose())
        database = patiently(storage, lambda: tables(storage))
        return optuna.create_study(storage=database, study_name=name, direction="maximize", load_if_exists=True)
    except InputError:
        raise
    except Exception as error:  # SQLAlchemy's or a database driver's
        raise InputError(f"--storage {storage!r} cannot be opened: {one_line(error)}") from error


def is_orphan(trial: FrozenTrial) -> bool:
    """Whether the process that asked for a running trial is gone."""
    if "owner" in trial.user_attrs:
        return Owner.parse(trial.user_attrs["owner"]).is_dead
    # Killed between two statements of ask(); one that is just being asked for is younger than this.
    return trial.datetime_start is None or datetime.now() - trial.datetime_start > timedelta(minutes=1)


def _attributes(cell: Cell) -> dict[str, Any]:
    config = json.dumps(cell.config.to_mapping(), sort_keys=True)
    return {"cell": cell.key, "row": cell.row, "seed": cell.seed, "config": config}


def _state(value: float | None) -> TrialState:
    from optuna.trial import TrialState

    return TrialState.FAIL if value is None else TrialState.COMPLETE
