"""Data, prompts, metrics. Importing this package registers the built-in tasks."""

from __future__ import annotations

from basisadapt.tasks import docstrings as docstrings
from basisadapt.tasks import glue as glue
from basisadapt.tasks.task import TASKS, Rows, Task, TaskData

__all__ = ["TASKS", "Rows", "Task", "TaskData"]
