"""The contract of a task: rows, what a model sees of them, and the metrics of its answers."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from basisadapt.core.errors import InputError
from basisadapt.core.registry import Registry
from basisadapt.tasks.settings import DataSettings

TASKS: Registry[Task] = Registry("task")

Example = Mapping[str, Any]  # a row as a model takes it: token ids, or pixels


@dataclass(frozen=True)
class Rows:
    """What is asked, in a form of the task's own such as a text or a pair of texts, and the right answers."""

    inputs: Sequence[Any]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows of these numbers, in their order."""
        return Rows([self.inputs[i] for i in indices], [self.labels[i] for i in indices])

    def mixed(self) -> Rows:
        """The rows in an order drawn once for all, from a fixed seed."""
        order = list(range(len(self)))
        random.Random(0).shuffle(order)
        return self.take(order)

    def head(self, count: int | None) -> Rows:
        """The first `count` rows; all for None."""
        return self.between(0, count)

    def between(self, start: int, end: int | None) -> Rows:
        """The rows from place `start` to before place `end`."""
        return Rows(self.inputs[start:end], self.labels[start:end])

    def split(self, share: float) -> tuple[Rows, Rows]:
        """All but the last `share` of the rows, and these; at least one each. Raises InputError for a single row."""
        if len(self) < 2:
            raise InputError(f"train.validation splits the training rows, and there is no more than {len(self)}")
        place = min(max(1, round((1 - share) * len(self))), len(self) - 1)
        return self.between(0, place), self.between(place, None)


@dataclass(frozen=True)
class TaskData:
    """A task's rows, in a fixed, mixed order, so that the first ones are a fair sample.

    mark: what tells these data from others, where the rows are too many to be read for it. about: what is to be
    recorded of them, in plain JSON types; "split", in words, where it is not the published one. prompts: sentences
    about each class, for a model that knows classes by them.
    """

    train: Rows
    eval: Rows
    mark: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[tuple[str, ...], ...] = ()

    def __hash__(self) -> int:
        """That of their sizes: what is kept for rows is found by it, and the rows are not read."""
        return hash((len(self.train), len(self.eval)))

    def fingerprint(self) -> str:
        """A hash of every input and label, or of the mark."""
        content = self.mark or [[repr(rows.inputs), repr(rows.labels)] for rows in (self.train, self.eval)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Task(ABC):
    """What a model is trained for and measured by. Subclass one of its forms with a name: `TextTask`, `ImageTask` or
    `CompletionTask`.

    form: what the model must be able to do, one of `backbones.FORMS`, such as "text" or "completion". max_length: what
    train.max_length is where nobody sets it; None for no limit. comparable: whether training rows can be measured as
    the held-out ones are, which then have a loss. notes: what the run's record is to say beside numbers, such as who
    has judged.
    """

    form: str
    max_length: ClassVar[int | None] = None
    comparable: ClassVar[bool] = True

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            TASKS.add(name, cls)

    def __init__(self, settings: DataSettings | None = None) -> None:
        self.settings = settings or DataSettings()
        self.notes: dict[str, str] = {}

    @property
    @abstractmethod
    def headline(self) -> str:
        """The key of the main metric, greater being better."""

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """Classes, or 1 for a regression; without meaning for completions. Raises InputError."""

    @abstractmethod
    def check(self, data_dir: Path | None) -> None:
        """Raise InputError if the data cannot be had; the built-in tasks read no rows for it."""

    def sources(self, data_dir: Path | None) -> Sequence[str]:
        """The ids of the hub's data sets that `load` asks for; none where all is on this machine."""
        return ()

    @abstractmethod
    def load(self, data_dir: Path | None) -> TaskData:
        """The rows, from `data_dir` where the task lives in files. Raises InputError naming file and row."""

    @abstractmethod
    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """The rows as the model takes them, one for one; for training, some that are too long may be left out.

        processor: what the form says, such as the backbone's tokenizer. max_length: in tokens.
        """

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """What makes a batch of examples."""

    @abstractmethod
    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's loss on a batch, and what `measure` needs of its answers, shape (rows, ...)."""

    @abstractmethod
    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """Metrics of the answers, `scores` of all batches under one another, to `rows`."""


def readable_folder(data_dir: Path) -> Path:
    """`data_dir`, checked. Raises InputError if it is not a folder that can be read."""
    try:
        next(data_dir.iterdir(), None)
    except OSError as error:
        raise InputError(f"data folder {str(data_dir)!r} cannot be read: {error.strerror}") from error
    return data_dir
