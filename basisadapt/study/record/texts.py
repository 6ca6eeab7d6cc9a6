"""Names and texts within MLflow's limits."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basisadapt.core.redaction import redacted
from basisadapt.study.record.stores import storable

TEXT_LIMIT = 5000  # below every limit that MLflow sets for tags, parameters and notes
NAME_LIMIT = 250  # of metrics, parameters and tags
METRICS, PARAMETERS = 900, 90  # per call


@functools.lru_cache(maxsize=1 << 14)  # the modules of one study's cells have the same names
def clean(name: str) -> str:
    """`name` in the characters that MLflow allows, \\w-. :/, as a relative path.

    A name that is empty or too long then is truncated and gets a hash.
    """
    words = " ".join(re.sub(r"[^\w\-. :/]+", " ", name).split())
    kept = "/".join(part for part in words.split("/") if part.strip() not in ("", ".", "..")).lstrip(".")
    if 0 < len(kept) <= NAME_LIMIT:
        return kept
    number = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept[: NAME_LIMIT - 9]} {number}".lstrip()


def limited(text: str) -> str:
    """The text without characters that stores refuse, truncated to TEXT_LIMIT."""
    return storable(text)[:TEXT_LIMIT]


def warnings_text(warnings: Sequence[str]) -> str:
    """The first warnings as JSON within TEXT_LIMIT."""
    kept = [storable(text)[:500] for text in warnings[:8]]
    while len(text := json.dumps(kept, ensure_ascii=False)) > TEXT_LIMIT:
        kept.pop()
    return text


def read_warnings(text: str) -> tuple[str, ...]:
    """The inverse of `warnings_text`; truncated JSON of an older record is one warning."""
    try:
        found = json.loads(text)
    except ValueError:
        return (text,)
    return tuple(map(str, found)) if isinstance(found, list) else (text,)


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """The items in batches of `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def write_into(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, name to content, into a folder; redacts secrets in texts. Raises OSError."""
    for name, content in files.items():
        whole = content if isinstance(content, bytes) else redacted(storable(content)).encode()
        (folder / name).write_bytes(whole)
