"""The rows of a run: read once, portioned, and encoded as its backbone takes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basisadapt import tasks
from basisadapt.tasks import DataSettings, Example, Rows, SeededTask, TaskData
from basisadapt.training.config import RunConfig


def load_data(config: RunConfig, data_dir: Path | None = None) -> TaskData:
    """All rows of the task, read once for as long as its files do not change. Raises InputError."""
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
    """Which rows a run trains on and is tested on, and for which backbone: what their examples follow from."""

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
        """The portion of `data` that a run takes."""
        train = config.train
        rows = train.max_length, train.train_rows, train.eval_rows, train.validation
        return Portion(data, config.task, config.data, config.backbone, *rows, processor)


@dataclass(frozen=True)
class Encoded:
    """Training rows and their examples, of which too long ones are missing; rows for the test and their questions."""

    train: Rows
    examples: Sequence[Example]
    held_out: Rows
    questions: Sequence[Example]


@functools.lru_cache(maxsize=2)
def encode(portion: Portion) -> Encoded:
    """The rows as the backbone takes them, encoded once for the cells of a process that share them."""
    task = tasks.find(portion.task, portion.settings)
    train, held_out = portion.data.train.head(portion.train_rows), portion.data.eval
    if portion.validation is not None:
        train, held_out = train.split(portion.validation)
    held_out = held_out.head(portion.eval_rows)
    examples = functools.partial(task.examples, processor=portion.processor, max_length=portion.max_length)
    held_out, questions = _longest_first(held_out, examples(held_out, training=False))
    return Encoded(train, examples(train, training=True), held_out, questions)


def _longest_first(rows: Rows, examples: Sequence[Example]) -> tuple[Rows, Sequence[Example]]:
    """Rows and their examples by length, so that a batch is hardly padded; as they are where they have no length."""
    if not isinstance(examples, list) or "input_ids" not in examples[0]:
        return rows, examples
    order = sorted(range(len(rows)), key=lambda i: -len(examples[i]["input_ids"]))
    return rows.take(order), [examples[i] for i in order]


def spread_rows(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spread."""
    return rows.take(spread_places(len(rows), count))


def spread_places(size: int, count: int) -> range:
    """At most `count` places among `size`, evenly spread."""
    count = min(count, size)
    return range(0, size // count * count, size // count)
