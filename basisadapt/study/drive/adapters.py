"""Saved adapters: the folder in which cells leave them, and merging the adapter of a run into its backbone."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from basisadapt.core.errors import InputError, shown
from basisadapt.methods.saved_adapter import Requirements, merge_into
from basisadapt.study.record.adapters import fetch_adapter


@contextmanager
def place_for_adapters(wanted: bool) -> Iterator[Path | None]:
    """A temporary folder for the adapters of cells until they are recorded; None if they are not wanted."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="basisadapt-adapters-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def merge_run(run: str, tracking_uri: str, target: Path) -> Requirements:
    """Write the merged model of a run to `target`, see `merge_into`.

    run: the id of the MLflow run, 32 hexadecimal digits, or a folder with a saved adapter. Raises InputError.
    """
    if Path(run).is_dir():
        return merge_into(Path(run), target)
    if not re.fullmatch(r"[0-9a-f]{32}", run):
        raise InputError(f"--merge needs a run's id in MLflow, 32 digits, or an adapter's folder, got {shown(run)}")
    with tempfile.TemporaryDirectory() as folder:
        return merge_into(fetch_adapter(tracking_uri, run, Path(folder)), target)
