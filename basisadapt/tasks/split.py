"""Which rows are held out, and in which order rows stand: by their texts alone, whatever else is in the data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from basisadapt.tasks.task import Rows


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Training rows and held-out ones, one in five, both mixed. Rows of one (first) text stay together."""
    rows = ordered(rows)
    return divide(rows, [is_held_out(question) for question in rows.inputs])


def divide(rows: Rows, held_out: Sequence[bool]) -> tuple[Rows, Rows]:
    """The rows that are not held out, and those that are."""
    train, test = ([i for i, out in enumerate(held_out) if out is part] for part in (False, True))
    return rows.take(train), rows.take(test)


def ordered(rows: Rows) -> Rows:
    """The rows in a fixed order that has nothing to do with their meaning."""
    return rows.take(sorted(range(len(rows)), key=lambda i: _number(rows.inputs[i])))


def is_held_out(question: Any) -> bool:
    """Whether a row with this text, or pair of texts, is one of the fifth that is evaluated on."""
    return _number(question) % 5 == 0


def _number(question: Any) -> int:
    text = question if isinstance(question, str) else question[0]
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
