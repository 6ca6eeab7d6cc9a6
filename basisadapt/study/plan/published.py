"""The published table that a study answers, and its values."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from typing import Any

from basisadapt.core.errors import InputError, refusing
from basisadapt.study.plan.shipped import studies_dir

Name = tuple[str, ...]  # a row of a published table: its parts, then the method if methods have columns


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """The published table that a study answers.

    table: a file in `studies/paper/`.
    key: the column with a row's name, or several columns with its parts.
    column: the column with the value, or method to column if methods have columns of their own.
    std: the same for the standard deviation. Default None, there is none.
    setting: what it was measured on. Default "".
    where: column to the value that a row must have there. Default: all rows.
    rows: label of a row of the sweep to its published name, where that is not "axis=value,...". Default {}.
    names: value on an axis, such as a method or a task, to its published name. If given, a row's published name is
        these names in the order of the axes. Default {}.
    """

    table: str
    key: str | list[str]
    column: str | dict[str, str]
    std: str | dict[str, str] | None = None
    setting: str = ""
    where: dict[str, str] = field(default_factory=dict)
    rows: dict[Any, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def published_values(answers: PublishedTable | None) -> dict[Name, tuple[str, str | None]]:
    """Row name to (value, standard deviation), as printed in the published table.

    If methods have columns of their own, the name ends with the method. Raises InputError if the table cannot be read.
    """
    if answers is None:
        return {}
    path = studies_dir() / "paper" / answers.table
    with refusing(f"published table {str(path)!r} cannot be read"), path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    try:
        rows = [row for row in table if all(row[name] == value for name, value in answers.where.items())]
        keys = answers.key if isinstance(answers.key, list) else [answers.key]
        columns, stds = _by_method(answers.column), _by_method(answers.std)
        return {
            (*(row[key] for key in keys), *method): (row[column], row[stds[method]] if method in stds else None)
            for method, column in columns.items()
            for row in rows
        }
    except KeyError as error:
        raise InputError(f"published table {answers.table} has no column {error}") from error


def _by_method(column: str | dict[str, str] | None) -> dict[Name, str]:
    """The end of a row's name to its column: (method,), or () if methods share a column."""
    if isinstance(column, dict):
        return {(method,): name for method, name in column.items()}
    return {} if column is None else {(): column}
