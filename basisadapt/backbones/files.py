"""The identity of weight files: a hash of their content, computed once."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from basisadapt.core.errors import refusing


def stamp(file: Path) -> tuple[int, ...]:
    """A file's size in bytes and its time of modification in nanoseconds, which change when the file does.

    Raises OSError.
    """
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def stamps(source: str) -> tuple[object, ...]:
    """What changes when a file of the folder `source` does; empty for what is no folder, such as a hub id."""
    folder = Path(source)
    return tuple((file.name, *stamp(file)) for file in sorted(folder.iterdir())) if folder.is_dir() else ()


def sha256_of(file: Path) -> str:
    """The sha256 of the content of `file`, cached until it changes. Raises InputError if it cannot be read."""
    with refusing(f"the weights {str(file)!r} cannot be read"):
        return _sha256_once(file, stamp(file))


@functools.lru_cache(maxsize=8)
def _sha256_once(file: Path, stamp: tuple[int, ...]) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
