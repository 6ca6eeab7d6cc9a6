"""Finds the task that a configuration names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from basisadapt.core.errors import InputError
from basisadapt.tasks import commonsense, files
from basisadapt.tasks.files import FileTask
from basisadapt.tasks.hub import PREFIX, HubTask
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.tables import SUFFIXES
from basisadapt.tasks.task import TASKS, Task


def find(name: str, settings: DataSettings) -> Task:
    """The task called `name`. No data is read.

    A name is that of a registered task, the path of a file with a known suffix, "hub:owner/name", or
    "commonsense/NAME" for the user's own mixture in the data folder. Raises InputError, with the nearest name, for any
    other.
    """
    if "\0" in f"{name}{settings.test}":
        raise InputError("task and data.test may not hold a NUL character")
    if name.startswith(PREFIX):
        return HubTask(name, settings)
    if Path(name).suffix.lower() in SUFFIXES:
        return FileTask(Path(name), settings)
    if os.path.isfile(name):  # Path.is_file would raise for some texts
        raise InputError(f"task {name!r} is a file of none of the formats {', '.join(SUFFIXES)}")
    if name not in TASKS and re.fullmatch(rf"{commonsense.PREFIX}[\w-]+", name):
        return commonsense.OwnMixture(name, settings)
    return TASKS[name](settings)


def stamp(name: str, settings: DataSettings) -> tuple[tuple[int, ...], ...]:
    """Numbers that change when one of the user's files of the task does; empty tuples for missing files."""
    paths = [Path(path) for path in (name, settings.test) if path is not None]
    return tuple(files.stamp(path) for path in paths if path.suffix.lower() in SUFFIXES)
