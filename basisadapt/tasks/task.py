"""The contract of a task: its rows, how a model sees them, and the metrics of the model's answers."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor

from basisadapt.core.errors import InputError, refusing
from basisadapt.core.registry import Registered, Registry
from basisadapt.tasks.settings import DataSettings

TASKS: Registry[Task] = Registry("task")

Example = Mapping[str, Any]  # a row as the model's input: token ids or pixels


@dataclass(frozen=True)
class Rows:
    """Questions and their correct answers.

    - `inputs`: in the task's own form, such as a text or a pair of texts.
    - `labels`: the answers, one for each input.
    """

    inputs: Sequence[Any]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows with these indices, in this order."""
        return Rows([self.inputs[i] for i in indices], [self.labels[i] for i in indices])

    def mixed(self) -> Rows:
        """The rows, shuffled with a fixed seed."""
        order = list(range(len(self)))
        random.Random(0).shuffle(order)
        return self.take(order)

    def head(self, count: int | None) -> Rows:
        """The first `count` rows, or all rows for None."""
        return Rows(self.inputs[:count], self.labels[:count])

    def split(self, share: float) -> tuple[Rows, Rows]:
        """All but the last `share` of the rows, and that share, at least one row each.

        Raises InputError for fewer than two rows.
        """
        if len(self) < 2:
            raise InputError(f"train.validation splits the training rows, which needs at least 2, got {len(self)}")
        place = min(max(1, round((1 - share) * len(self))), len(self) - 1)
        return self.head(place), Rows(self.inputs[place:], self.labels[place:])


@dataclass(frozen=True)
class TaskData:
    """A task's rows, in a fixed, shuffled order, so that the first ones are a fair sample.

    - `train`: the training rows.
    - `eval`: the rows to evaluate on.
    - `mark` (str or None, default None): identifies the data, if there are too many rows to hash them.
    - `about` (default empty): facts to record, in plain JSON types; "split" describes a split that is not the published
      one.
    - `prompts` (default empty): sentences about each class, for models that represent classes by them.
    - `classes` (default empty): the names of the classes, in the order of their indices, where they have names.
    """

    train: Rows
    eval: Rows
    mark: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[tuple[str, ...], ...] = ()
    classes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        """A hash of the numbers of rows; caches use it, so it must not read the rows."""
        return hash((len(self.train), len(self.eval)))

    def fingerprint(self) -> str:
        """A hash of all inputs and labels, or of the mark if there is one: 16 hexadecimal digits."""
        content = self.mark or [[repr(rows.inputs), repr(rows.labels)] for rows in (self.train, self.eval)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Task(Registered, ABC):
    """The data and the metrics that a model is trained and evaluated with.

    Subclass one of its forms with a name: `TextTask`, `ImageTask` or `CompletionTask`.

    - `form` (str): what the model must be able to do, a key of `backbones.FORMS`, such as "text" or "completion".
    - `max_length` (int or None, default None): the default of train.max_length, in tokens; None is no limit.
    - `comparable` (bool, default True): training rows can be evaluated like the held-out rows, which have a loss.
    - `settings`: the `data.*` settings.
    - `notes`: texts for the record of the run, such as the name of the judge.
    """

    registry = TASKS
    form: str
    max_length: ClassVar[int | None] = None
    comparable: ClassVar[bool] = True

    def __init__(self, settings: DataSettings | None = None) -> None:
        self.settings = settings or DataSettings()
        self.notes: dict[str, str] = {}

    @property
    @abstractmethod
    def headline(self) -> str:
        """The key of the main metric, of which greater values are better."""

    @property
    @abstractmethod
    def num_labels(self) -> int:
        """The number of classes, or 1 for a regression; unused for completions. Raises InputError."""

    @abstractmethod
    def check(self, data_dir: Path | None) -> None:
        """Raise InputError if the data is not available. Except for the user's own data, no rows are read."""

    @property
    def on_hub(self) -> Sequence[str]:
        """The ids of the data sets on the hub that `load` reads without a data folder; none by default."""
        return ()

    def sources(self, data_dir: Path | None) -> Sequence[str]:
        """The ids of the data sets that `load` reads from the hub: `on_hub`, or none with a data folder."""
        return self.on_hub if data_dir is None else ()

    @abstractmethod
    def load(self, data_dir: Path | None) -> TaskData:
        """The rows; data_dir: the data folder, for tasks that read files. Raises InputError naming file and row."""

    @abstractmethod
    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """The rows as inputs of the model, one for each row; for training, rows that are too long may be left out.

        - `rows`: the rows to encode.
        - `processor`: that of the form, such as the backbone's tokenizer.
        - `max_length` (int or None): in tokens.
        - `training` (bool): the rows are trained on.
        """

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """A function that makes a batch, a mapping of tensors, from a list of examples.

        By default it stacks tensors of one shape, and makes a tensor of "labels", numbers, of shape (rows,).
        """
        from transformers import default_data_collator

        return cast(Callable[[list[Example]], dict[str, Tensor]], default_data_collator)

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's loss on a batch, a scalar, and its answers as `measure` needs them, shape (rows, ...).

        By default these are the loss and the logits that the model returns.
        """
        output = model(**batch)
        return output.loss, output.logits

    @abstractmethod
    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The metrics of the answers to `rows`.

        scores: those of `score`, concatenated over all batches, shape (rows, ...).
        """


def readable_folder(data_dir: Path) -> Path:
    """`data_dir` itself. Raises InputError if it is not a readable folder."""
    with refusing(f"data folder {str(data_dir)!r} cannot be read"):
        next(data_dir.iterdir(), None)
    return data_dir
