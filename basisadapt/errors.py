"""The errors that users are meant to read, the nearest valid choice that goes into one, and others in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user asked for cannot be done. The message is one line: what was wrong, what was expected."""


class RecordError(Exception):
    """What was run cannot be recorded. What is recorded stays as it is. The message is one line."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a `name` that is not among the `known` names of a `kind`, with the nearest one.

    A long list of names is left out where there is a nearest one.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    listed = f" (known: {', '.join(names) or 'none'})" if not nearest or len(names) <= 12 else ""
    return InputError(f"unknown {kind} {str(name)!r}{hint}{listed}")


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
