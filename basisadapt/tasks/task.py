"""The contract of a task: rows of text with labels, and the metrics of predictions."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from basisadapt.errors import InputError
from basisadapt.registry import Registry

TASKS: Registry[Task] = Registry("task")


@dataclass(frozen=True)
class Rows:
    """Texts, a second text for pairs, and labels: class indices, or numbers for a regression."""

    first: list[str]
    second: list[str] | None
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.first)

    def head(self, count: int | None) -> Rows:
        """The first `count` rows; all for None."""
        return self.between(0, count)

    def between(self, start: int, end: int | None) -> Rows:
        """The rows from place `start` to before place `end`."""
        part = slice(start, end)
        return Rows(self.first[part], None if self.second is None else self.second[part], self.labels[part])

    def split(self, share: float) -> tuple[Rows, Rows]:
        """All but the last `share` of the rows, and these; at least one each. Raises InputError for a single row."""
        if len(self) < 2:
            raise InputError(f"train.validation splits the training rows, and there is no more than {len(self)}")
        place = min(max(1, round((1 - share) * len(self))), len(self) - 1)
        return self.between(0, place), self.between(place, None)


@dataclass(frozen=True)
class TaskData:
    """A task's rows. They are in a fixed, mixed order, so that the first ones are a fair sample."""

    train: Rows
    eval: Rows

    def fingerprint(self) -> str:
        """A hash of every text and label."""
        digest = hashlib.sha256()
        for rows in (self.train, self.eval):
            digest.update(json.dumps([rows.first, rows.second, rows.labels]).encode())
        return digest.hexdigest()[:16]


class Task(ABC):
    """A text task. Subclass it with a name; `headline` is the key of its main metric, greater being better.

    `num_labels` is the number of classes, or 1 for a regression.
    """

    headline: ClassVar[str]
    num_labels: ClassVar[int]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            TASKS.add(name, cls)

    @abstractmethod
    def check(self, data_dir: Path | None) -> None:
        """Raise InputError if the data cannot be had; reads no rows."""

    @abstractmethod
    def load(self, data_dir: Path | None) -> TaskData:
        """The rows, from `data_dir` where the task lives in files."""

    @abstractmethod
    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics of the model's `scores`, shape (rows, num_labels), against `labels`, shape (rows,)."""


def readable_folder(data_dir: Path) -> Path:
    """`data_dir`, checked. Raises InputError if it is not a folder that can be read."""
    try:
        next(data_dir.iterdir(), None)
    except OSError as error:
        raise InputError(f"data folder {str(data_dir)!r} cannot be read: {error.strerror}") from error
    return data_dir
