"""What takes most of a study's time and is not what most tests look at: drawing, the disk, the history of tables."""

from __future__ import annotations

import base64
import sqlite3
from contextlib import contextmanager
from unittest import mock

from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.engine import Engine

from basisadapt.diagnostics import figures
from basisadapt.study.report import files

PLACES = ((figures, "figures"), (figures, "_png"), (files, "_png"))  # make a cell's figures; draw those; draw reports'
DRAWN = {place: getattr(*place) for place in PLACES}
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
SHOWN = ("modules", "snapshots", "phi", "curves", "landscape")  # of a result, in its figures; of its metrics:
LOSSES = ("eval_loss", "generalisation_gap")
_made: dict[str, list[str]] = {}


def _made_once(title, result):
    """The names of a result's figures, which are made once for all results that show the same."""
    losses = {name: result["metrics"][name] for name in LOSSES if name in result["metrics"]}
    shown = repr([losses, *(result[part] for part in SHOWN)])
    if shown not in _made:
        _made[shown] = [*DRAWN[figures, "figures"](title, result)]
    return dict.fromkeys(_made[shown])


UNDRAWN = dict(zip(PLACES, (_made_once, lambda figure: PIXEL, lambda figure: PIXEL), strict=True))


def put(made):
    """Have a whole process make figures so: DRAWN, or UNDRAWN."""
    for (module, name), function in made.items():
        setattr(module, name, function)


@contextmanager
def unhurried():
    """SQLite leaves to the system when it writes what is committed; a process may be killed all the same. The newest
    form of their tables, which MLflow and Optuna look up whenever they open a file, is read once."""
    read, known = ScriptDirectory.from_config, {}

    def connect(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    def from_config(config):
        place = config.get_main_option("script_location")
        if place not in known:
            known[place] = read(config)
        return known[place]

    event.listen(Engine, "connect", connect)
    with mock.patch.object(ScriptDirectory, "from_config", from_config):
        yield
    event.remove(Engine, "connect", connect)
