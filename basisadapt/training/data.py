"""The rows of a run: read once, divided, and encoded for its backbone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basisadapt import tasks
from basisadapt.tasks import DataSettings, Example, Rows, SeededTask, TaskData
from basisadapt.training.config import RunConfig


def load_data(config: RunConfig, data_dir: Path | None = None) -> TaskData:
    """All rows of the task, cached until its files change. Raises InputError if they cannot be read."""
    task = tasks.find(config.task, config.data)
    if isinstance(task, SeededTask):
        return task.of_seed(config.seed, data_dir)
    return _load(config.task, config.data, data_dir, tasks.stamp(config.task, config.data))


@functools.lru_cache(maxsize=2)
def _load(task: str, settings: DataSettings, data_dir: Path | None, stamp: tuple[tuple[int, ...], ...]) -> TaskData:
    loader = tasks.find(task, settings)
    loader.check(data_dir)
    return loader.load(data_dir)


@dataclass(frozen=True)
class Portion:
    """The rows that a run trains and is evaluated on, and its backbone: everything that its examples depend on.

    - `data`: all rows of the task.
    - `task` (str): its name.
    - `settings`: how the data are read.
    - `backbone` (str): its name.
    - `max_length`, `train_rows`, `eval_rows`, `validation`: as in `TrainSettings`.
    - `processor`: the backbone's tokenizer or image processor; two portions compare equal without it.
    """

    data: TaskData
    task: str
    settings: DataSettings
    backbone: str
    max_length: int | None
    train_rows: int | None
    eval_rows: int | None
    validation: float | None
    processor: Any = field(compare=False)

    @staticmethod
    def of(config: RunConfig, data: TaskData, processor: Any) -> Portion:
        """The portion of `data` for the run `config`."""
        train = config.train
        rows = train.max_length, train.train_rows, train.eval_rows, train.validation
        return Portion(data, config.task, config.data, config.backbone, *rows, processor)


@dataclass(frozen=True)
class Encoded:
    """The encoded rows of a run.

    - `train`: the training rows.
    - `examples`: their examples, without those that are too long.
    - `held_out`: the rows to evaluate on.
    - `questions`: their examples, one for each row.
    - `ask`: makes the examples to evaluate any of the rows.
    """

    train: Rows
    examples: Sequence[Example]
    held_out: Rows
    questions: Sequence[Example]
    ask: Callable[[Rows], Sequence[Example]]


@functools.lru_cache(maxsize=2)
def encode(portion: Portion) -> Encoded:
    """Encode the rows for the backbone. The last two results are cached, for runs of one process that share them.

    Raises InputError as `Task.examples`.
    """
    task = tasks.find(portion.task, portion.settings)
    train, held_out = portion.data.train.head(portion.train_rows), portion.data.eval
    if portion.validation is not None:
        train, held_out = train.split(portion.validation)
    held_out = held_out.head(portion.eval_rows)
    examples = functools.partial(task.examples, processor=portion.processor, max_length=portion.max_length)
    ask = functools.partial(examples, training=False)
    held_out, questions = _longest_first(held_out, ask(held_out))
    return Encoded(train, examples(train, training=True), held_out, questions, ask)


def _longest_first(rows: Rows, examples: Sequence[Example]) -> tuple[Rows, Sequence[Example]]:
    """Rows and examples sorted by length, so that batches need little padding; unchanged if they have no length."""
    if not isinstance(examples, list) or "input_ids" not in examples[0]:
        return rows, examples
    order = sorted(range(len(rows)), key=lambda i: -len(examples[i]["input_ids"]))
    return rows.take(order), [examples[i] for i in order]


def spread_rows(rows: Rows, count: int) -> Rows:
    """At most `count` of the rows, evenly spaced."""
    return rows.take(spread_places(len(rows), count))


def spread_places(size: int, count: int) -> range:
    """At most `count` indices below `size`, evenly spaced."""
    count = min(count, size)
    return range(0, size // count * count, size // count)
