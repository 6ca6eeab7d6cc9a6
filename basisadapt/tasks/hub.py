"""A task from a data set on the Hugging Face hub: `task: hub:owner/name` or `hub:owner/name/config`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basisadapt.core.errors import InputError, refusing, unknown
from basisadapt.core.redaction import redacted
from basisadapt.tasks.own_data import OwnData
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.tables import DataColumns, check_columns

PREFIX = "hub:"


class HubTask(OwnData):
    """Trains on the split "train", and evaluates on the split `data.test`, by default "validation" or else "test".

    The library `datasets` downloads and caches the data; no code from the hub is run.
    """

    def __init__(self, name: str, settings: DataSettings) -> None:
        """Raise InputError for a malformed name."""
        super().__init__(settings)
        parts = name.removeprefix(PREFIX).split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise InputError(
                f"task {name!r} must be hub:owner/name or hub:owner/name/config, with the owner that the data set's "
                "page on the hub shows"
            )
        if not all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in parts[:2]):
            raise InputError(f"task {name!r}: owner and name on the hub consist of letters, digits, '-', '_' and '.'")
        self._source, self._config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None

    def sources(self, data_dir: Path | None) -> Sequence[str]:
        """The data set itself, always: it is never a local folder."""
        return (self._source,)

    def tables(self) -> tuple[DataColumns, DataColumns | None]:
        """The splits, from the hub or the cache of `datasets`. Raises InputError."""
        parts = ask_hub(self._source, self._config)
        for split in ("train", *([self.settings.test] if self.settings.test else [])):
            if split not in parts:
                raise InputError(f"hub data set {self._source!r}: {unknown('split', split, parts)}")
        if self.settings.test == "train":
            raise InputError("data.test 'train' is the split that is trained on")
        test = self.settings.test or next((split for split in ("validation", "test") if split in parts), None)
        return self._table(parts, "train"), None if test is None else self._table(parts, test)

    def _table(self, parts: Any, split: str) -> DataColumns:
        source, part = f"hub data set {self._source!r}, split {split!r}", parts[split]
        check_columns(source, part.column_names, self.columns)
        values = {column: list(part[column]) for column in self.columns}
        table = DataColumns(source, "row", range(1, len(part) + 1), values)
        if not len(table):
            raise InputError(f"{source} has no rows")
        names = getattr(part.features[self.settings.label], "names", None)
        return table if names is None else _named(table, self.settings.label, names)


def _named(table: DataColumns, column: str, names: list[str]) -> DataColumns:
    """The table with class indices replaced by names. Raises InputError for -1, which marks a withheld label."""
    for row, index in enumerate(table.columns[column]):
        if index == -1:
            raise table.error(row, "the label is withheld; name another split with data.test")
    named = [None if index is None else names[index] for index in table.columns[column]]
    return DataColumns(table.source, table.unit, table.numbers, {**table.columns, column: named})


def is_cached(source: str) -> bool:
    """Whether something of a data set is in `datasets`' cache."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE, source.replace("/", "___")).is_dir()


def rows_from_hub(what: str, source: str, config: str | None = None, revision: str | None = None) -> Any:
    """`ask_hub` for `what`, which can be read from a folder too. Raises InputError, which names both ways."""
    with refusing(f"{what} needs --data-dir or the hub", InputError):
        return ask_hub(source, config, revision)


@functools.lru_cache(maxsize=2)
def ask_hub(source: str, config: str | None, revision: str | None = None) -> Any:
    """The splits of a data set, name to rows; the last two are cached. Raises InputError if it cannot be loaded."""
    from datasets import load_dataset

    if os.path.exists(source):  # `datasets` would read it instead
        raise InputError(f"hub data set {source!r} is also a local folder's name; start elsewhere, or rename it")
    try:
        return load_dataset(source, config, revision=revision)
    except Exception as error:  # the hub's client raises many kinds
        reason = " ".join(redacted(str(error)).split())[:200]
        raise InputError(f"hub data set {source!r} could not be loaded: {reason}") from error
