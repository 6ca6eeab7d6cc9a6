"""From what a configuration calls a task to the task."""

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
    """The task called `name`: a registered one, a file by its suffix, "hub:owner/name", or "commonsense/NAME" of a
    mixture of one's own in the data folder. Reads nothing.

    Raises InputError naming the nearest.
    """
    if "\0" in f"{name}{settings.test}":
        raise InputError("task and data.test may not hold a NUL character")
    if name.startswith(PREFIX):
        return HubTask(name, settings)
    if Path(name).suffix.lower() in SUFFIXES:
        return FileTask(Path(name), settings)
    if os.path.isfile(name):  # which takes any text, as Path.is_file does not
        raise InputError(f"task {name!r} is a file of none of the formats {', '.join(SUFFIXES)}")
    if name not in TASKS and re.fullmatch(rf"{commonsense.PREFIX}[\w-]+", name):
        return commonsense.OwnMixture(name, settings)
    return TASKS[name](settings)


def stamp(name: str, settings: DataSettings) -> tuple[tuple[int, ...], ...]:
    """What changes when one of the task's own files does."""
    paths = [Path(path) for path in (name, settings.test) if path is not None]
    return tuple(files.stamp(path) for path in paths if path.suffix.lower() in SUFFIXES)
