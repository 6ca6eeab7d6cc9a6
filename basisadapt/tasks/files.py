"""A task from the user's own file: `task: reviews.csv`."""

from __future__ import annotations

import functools
from pathlib import Path

from basisadapt.core.errors import InputError, unknown
from basisadapt.tasks.own_data import OwnData
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.tables import SUFFIXES, DataColumns, read_table


class FileTask(OwnData):
    """Rows from a file whose suffix gives its format (`tables`); `data.test` is a file of rows to evaluate on.

    Paths are relative to the working directory, not to the data folder.
    """

    def __init__(self, path: Path, settings: DataSettings) -> None:
        super().__init__(settings)
        self._path = path

    def tables(self) -> tuple[DataColumns, DataColumns | None]:
        """Both files, cached until they change. Raises InputError naming file and row."""
        train = self._read(self._path)
        if self.settings.test is None:
            return train, None
        test = Path(self.settings.test)
        if test.suffix.lower() not in SUFFIXES:
            raise unknown("suffix of data.test", test.suffix, SUFFIXES)
        if test.exists() and test.samefile(self._path):
            raise InputError(f"data.test {str(test)!r} is the file that is trained on")
        return train, self._read(test)

    def _read(self, path: Path) -> DataColumns:
        return _read_once(path, tuple(self.columns), stamp(path))


def stamp(path: Path) -> tuple[int, ...]:
    """Numbers that change when the file does (device, inode, size, times); empty if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache(maxsize=4)
def _read_once(path: Path, columns: tuple[str, ...], stamp: tuple[int, ...]) -> DataColumns:
    return read_table(path, columns)
