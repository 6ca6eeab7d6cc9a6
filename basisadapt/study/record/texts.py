"""What MLflow takes: names, texts, and how many of something in one call."""

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
METRICS, PARAMETERS = 900, 90  # in one call, likewise


@functools.lru_cache(maxsize=1 << 14)  # the modules of one study's cells have the same names
def clean(name: str) -> str:
    """`name` as MLflow allows it: letters, digits and _-. :/, a path without detours; another is cut and numbered."""
    words = " ".join(re.sub(r"[^\w\-. :/]+", " ", name).split())
    kept = "/".join(part for part in words.split("/") if part.strip() not in ("", ".", "..")).lstrip(".")
    if 0 < len(kept) <= NAME_LIMIT:
        return kept
    number = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept[: NAME_LIMIT - 9]} {number}".lstrip()


def limited(text: str) -> str:
    """What stores take of a text."""
    return storable(text)[:TEXT_LIMIT]


def warnings_text(warnings: Sequence[str]) -> str:
    """The first warnings, in a form that is whole and fits."""
    kept = [storable(text)[:500] for text in warnings[:8]]
    while len(text := json.dumps(kept, ensure_ascii=False)) > TEXT_LIMIT:
        kept.pop()
    return text


def read_warnings(text: str) -> tuple[str, ...]:
    """What `warnings_text` was given; of what was cut off once, the text as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        return (text,)
    return tuple(map(str, found)) if isinstance(found, list) else (text,)


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """The items, so many at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def write_into(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, by name, into a folder: texts without secrets. Raises OSError."""
    for name, content in files.items():
        whole = content if isinstance(content, bytes) else redacted(storable(content)).encode()
        (folder / name).write_bytes(whole)
