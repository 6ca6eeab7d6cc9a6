"""Tasks: their data, prompts and metrics. Importing this package registers the built-in ones."""

from __future__ import annotations

from basisadapt.tasks import commonsense as commonsense
from basisadapt.tasks import digits as digits
from basisadapt.tasks import docstrings as docstrings
from basisadapt.tasks import facts as facts
from basisadapt.tasks import fashion_mnist as fashion_mnist
from basisadapt.tasks import glue as glue
from basisadapt.tasks import instruct as instruct
from basisadapt.tasks import matrix as matrix
from basisadapt.tasks import recovery as recovery
from basisadapt.tasks import rules as rules
from basisadapt.tasks import update as update
from basisadapt.tasks import vision as vision
from basisadapt.tasks.completion import CompletionTask
from basisadapt.tasks.drawn import DrawnTask, SeededTask
from basisadapt.tasks.image import ImageTask
from basisadapt.tasks.lookup import find, stamp
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.task import TASKS, Example, Rows, Task, TaskData
from basisadapt.tasks.text import TextTask

__all__ = [
    "TASKS",
    "CompletionTask",
    "DataSettings",
    "DrawnTask",
    "Example",
    "ImageTask",
    "Rows",
    "SeededTask",
    "Task",
    "TaskData",
    "TextTask",
    "find",
    "stamp",
]
