"""The user's cache folder, for results that are computed once and kept."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder BASISADAPT_CACHE, or "basisadapt" in the platform's cache folder. It need not exist yet."""
    if chosen := os.environ.get("BASISADAPT_CACHE"):
        return Path(chosen)
    home = {"darwin": Path.home() / "Library" / "Caches", "win32": Path.home() / "AppData" / "Local"}
    return Path(os.environ.get("XDG_CACHE_HOME") or home.get(sys.platform, Path.home() / ".cache")) / "basisadapt"


def kept(name: str, make: Callable[[], Any]) -> Any:
    """The JSON value in the cache file `name`; if the file cannot be read, `make()` computes the value and it is saved.

    The file is renamed into place once it is complete, so no process reads half of one. If the cache cannot be
    written, the value is returned and not kept. Raises what `make` raises.
    """
    file = cache_folder() / name
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        value = make()
    part = file.with_name(f"{name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(file)
    except OSError:
        with suppress(OSError):
            part.unlink()
    return value
