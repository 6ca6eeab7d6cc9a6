"""Chooses the held-out rows and the order of rows by hashes of their texts, whatever other rows there are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from basisadapt.tasks.task import Rows


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, one in five or so, both shuffled. Rows of one (first) text stay together."""
    rows = ordered(rows)
    return divide(rows, [is_held_out(question) for question in rows.inputs])


def divide(rows: Rows, held_out: Sequence[bool]) -> tuple[Rows, Rows]:
    """The rows that are not held out, and those that are. held_out: a bool for each row."""
    train, test = ([i for i, out in enumerate(held_out) if out is part] for part in (False, True))
    return rows.take(train), rows.take(test)


def ordered(rows: Rows) -> Rows:
    """The rows, sorted by hashes of their (first) texts: a fixed order, independent of their meaning."""
    return rows.take(sorted(range(len(rows)), key=lambda i: _number(rows.inputs[i])))


def is_held_out(question: Any) -> bool:
    """Whether a row with this text, or pair of texts, belongs to the held-out fifth."""
    return _number(question) % 5 == 0


def _number(question: Any) -> int:
    text = question if isinstance(question, str) else question[0]
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
