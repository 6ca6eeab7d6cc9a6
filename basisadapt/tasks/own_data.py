"""The user's own texts and labels, from columns of a table; the labels are classes or numbers."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from basisadapt.core.errors import InputError, unknown
from basisadapt.tasks import metrics
from basisadapt.tasks.split import divide, is_held_out, ordered
from basisadapt.tasks.tables import DataColumns, UnknownColumn
from basisadapt.tasks.task import Rows, TaskData
from basisadapt.tasks.text import TextTask

MISSING = ("NaN", "nan", "None", "<NA>")
MAX_NUMBERS = 20  # integers with at most this many distinct values are classes


class OwnData(TextTask):
    """Texts and labels in the columns `data.text`, `data.second` (for pairs) and `data.label`.

    Labels that are texts, or integers with at most 20 distinct values, are classes, in sorted order. Numbers with a
    fraction are regression targets; the model learns (y − mean) / deviation, with the statistics of the training rows.
    For integers with more values, `data.kind` must say which they are; it also overrides the other rules. Whitespace
    around a label is dropped.

    Without rows to evaluate on, one row in five is held out, chosen by a hash of its (first) text; the only row of a
    class stays in training. A row without a text or label, a number that is not finite, and a label that no training
    row has raise InputError naming the row.
    """

    @abstractmethod
    def tables(self) -> tuple[DataColumns, DataColumns | None]:
        """The training rows, and the rows to evaluate on or None, each with `columns`. Raises InputError."""

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are read: of one or two texts, and of the label."""
        return [name for name in (self.settings.text, self.settings.second, self.settings.label) if name is not None]

    @property
    def headline(self) -> str:
        """The main metric: "accuracy" of classes, "pearson" of numbers. Reads the rows; raises InputError."""
        return "accuracy" if self._content.classes else "pearson"

    @property
    def num_labels(self) -> int:
        """The number of classes, or 1 for a regression. Reads the rows; raises InputError."""
        return len(self._content.classes) or 1

    def check(self, data_dir: Path | None) -> None:
        """Read all rows, so that an error in any of them is raised before anything runs."""
        self.load(data_dir)

    def load(self, data_dir: Path | None) -> TaskData:
        """Training and held-out rows, in an order that depends only on their texts. Raises InputError."""
        return self._content

    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, macro F1 and Matthews correlation of classes; Pearson and Spearman correlation of numbers.

        scores: (rows, num_labels); labels: (rows,).
        """
        return metrics.of_classes(scores, labels) if self._content.classes else metrics.of_numbers(scores, labels)

    @functools.cached_property
    def _content(self) -> TaskData:
        try:
            train, test = self.tables()
        except UnknownColumn as error:
            raise InputError(f"{error}; data.text, data.second and data.label name the columns") from error
        written = self._written(train)
        classes = _classes(train, written.labels, self.settings.kind)
        rows = ordered(_encoded(train, written, classes))
        if test is None:
            rows, others = _hold_out(rows, train.source)
            split = "one row in five is held out, chosen by its text"
        else:
            others = ordered(_encoded(test, self._written(test), classes))
            split = f"evaluated on {test.source}"
        if classes:
            return TaskData(rows, others, about={"split": split, "classes": list(classes)}, classes=classes)
        rows, others, scale = _standardized(rows, others, train.source)
        return TaskData(rows, others, about={"split": split, **scale})

    def _written(self, table: DataColumns) -> Rows:
        """The rows, with their labels as texts. Raises InputError naming the row."""
        _check_truths(table, self.settings.label)
        *texts, labels = (
            [_value(table, row, column, value) for row, value in enumerate(table.columns[column])]
            for column in self.columns
        )
        if self.settings.kind is None:
            _check_present(table, labels)
        inputs: list[Any] = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        return Rows(inputs, [label.strip() for label in labels])


# --- values ---


def _value(table: DataColumns, row: int, column: str, value: Any) -> str:
    """A value as text. Raises InputError, naming the row, if there is none."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if missing or not text.strip():
        raise table.error(row, f"nothing in column {column!r}")
    if not isinstance(value, str | int | float | Decimal):
        raise table.error(row, f"column {column!r} must hold texts or numbers, got {type(value).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise table.error(row, f"column {column!r} holds half a character (a lone surrogate)") from error
    return text


def _check_truths(table: DataColumns, column: str) -> None:
    """Raise InputError for true or false among numbers: in some formats they equal 1 and 0, in others not."""
    truths = [row for row, value in enumerate(table.columns[column]) if isinstance(value, bool)]
    if truths and any(isinstance(value, int | float) for value in table.columns[column] if not isinstance(value, bool)):
        raise table.error(truths[0], f"column {column!r} has true or false here, and numbers in other rows")


def _check_present(table: DataColumns, labels: Sequence[str]) -> None:
    """Raise InputError for text labels among which Python's or pandas' names of a missing value occur.

    Among numbers they are refused as not finite.
    """
    missing = [row for row, label in enumerate(labels) if label.strip() in MISSING]
    if missing and any(_number(label) is None for label in labels if label.strip() not in MISSING):
        label = labels[missing[0]].strip()
        raise table.error(
            missing[0],
            f"the label {label!r} usually stands for a missing value; leave the row out, or set data.kind=classes to "
            "make it a class",
        )


def _number(label: str) -> float | None:
    try:
        return None if "_" in label else float(label)
    except ValueError:
        return None


def _whole(label: str) -> str:
    """An integer label in one form ("1" for 1, 1.0 and 01); any other label unchanged."""
    number = _number(label)
    if number is None or not number.is_integer():
        return label
    return str(int(number)) if abs(number) < 2**53 else label


def _short(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:40]}..."


# --- classes or numbers ---


def _classes(table: DataColumns, labels: Sequence[str], kind: str | None) -> tuple[str, ...]:
    """The classes, sorted (integers by value); empty if the labels are numbers. Raises InputError."""
    numbers = [_number(label) for label in labels]
    if kind == "numbers" or (kind is None and _are_numbers(table, labels, numbers)):
        return ()
    if all(number is not None and number.is_integer() for number in numbers):
        names = sorted({_whole(label) for label in labels}, key=float)
    else:
        names = sorted(set(labels))
    if len(names) == 1:
        raise InputError(f"{table.source}: all rows have the label {_short(names[0])!r}, which leaves nothing to learn")
    if 2 * len(names) > len(labels):
        raise InputError(
            f"{table.source}: {len(names)} different labels in {len(labels)} rows are too many for classes, or "
            "there are too few rows"
        )
    return tuple(names)


def _are_numbers(table: DataColumns, labels: Sequence[str], numbers: Sequence[float | None]) -> bool:
    texts = [row for row, number in enumerate(numbers) if number is None]
    different = len(set(labels))
    if texts:
        if different > MAX_NUMBERS and 2 * len(texts) < len(labels):
            raise table.error(texts[0], f"label {_short(labels[texts[0]])!r} is not a number, as most labels are")
        return False
    if any(number is not None and not number.is_integer() for number in numbers):
        return True
    if different > MAX_NUMBERS:
        raise InputError(
            f"{table.source}: whole numbers with {different} different values as labels may be classes or numbers; "
            "say which with data.kind"
        )
    return False


def _encoded(table: DataColumns, written: Rows, classes: Sequence[str]) -> Rows:
    labels: list[Any] = _indices(table, written.labels, classes) if classes else _numbers(table, written.labels)
    return Rows(written.inputs, labels)


def _indices(table: DataColumns, labels: Sequence[str], classes: Sequence[str]) -> list[int]:
    index = {name: i for i, name in enumerate(classes)}
    for row, label in enumerate(labels):
        if label not in index and _whole(label) not in index:
            raise table.error(row, f"{unknown('label', _short(label), map(_short, classes))}")
    return [index[label] if label in index else index[_whole(label)] for label in labels]


def _numbers(table: DataColumns, labels: Sequence[str]) -> list[float]:
    numbers = []
    for row, label in enumerate(labels):
        number = _number(label)
        if number is None or not math.isfinite(number):
            raise table.error(row, f"label {_short(label)!r} is not a finite number")
        numbers.append(number)
    return numbers


# --- training and evaluation rows ---


def _hold_out(rows: Rows, source: str) -> tuple[Rows, Rows]:
    """Training and held-out rows, from shuffled ones. Every class (an int label) has a row to train on."""
    held_out = [is_held_out(question) for question in rows.inputs]
    trained = {label for label, out in zip(rows.labels, held_out, strict=True) if not out}
    for row, label in enumerate(rows.labels):
        if isinstance(label, int) and label not in trained:
            held_out[row] = False
            trained.add(label)
    train, test = divide(rows, held_out)
    if not len(train) or not len(test):
        raise InputError(f"{source}: {len(rows)} rows are too few to hold one in five out; give data.test")
    return train, test


def _standardized(train: Rows, test: Rows, source: str) -> tuple[Rows, Rows, dict[str, float]]:
    """Labels as (y − mean) / deviation over the training rows, and these two numbers.

    Raises InputError if all labels of one part are equal, or their range is too large.
    """
    largest = max(abs(label) for label in train.labels) or 1.0
    shares = np.array(train.labels) / largest  # whose squares do not overflow
    mean, deviation = float(shares.mean()), float(shares.std())
    if deviation == 0 or len(set(test.labels)) == 1:
        raise InputError(f"{source}: all labels to train on, or all to evaluate on, are one number")
    rows, others = (
        Rows(part.inputs, [(label / largest - mean) / deviation for label in part.labels]) for part in (train, test)
    )
    if not all(abs(label) < 1e15 for label in (*rows.labels, *others.labels)):
        raise InputError(f"{source}: some labels are 1e15 times as far apart as those to train on")
    return rows, others, {"mean": mean * largest, "deviation": deviation * largest}
