"""The errors that users are meant to read, the nearest valid choice that goes into one, and others in one line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 100  # characters of a value in a message
MOST_NAMES, MOST_COMPARED = 40, 10_000  # names that are listed, and among which the nearest is looked for

_short = reprlib.Repr()
_short.maxstring = _short.maxother = LONGEST
_short.maxlong, _short.maxlevel = 40, 4


class InputError(ValueError):
    """Something the user asked for cannot be done. The message is one line: what was wrong, what was expected."""


class RecordError(Exception):
    """What was run cannot be recorded. What is recorded stays as it is. The message is one line."""


def unknown(kind: str, name: object, known: Iterable[str], alike: float = 0.5) -> InputError:
    """The error for a `name` that is not among the `known` names of a `kind`, with the nearest one.

    The nearest is a name that the last words are, as dropout is of lora_dropout, or one that is `alike`, from 0 to 1. A
    long list of names is left out where there is a nearest one.
    """
    names = sorted(known)
    name = str(name) if isinstance(name, str | int | float) else shown(name)
    compared = [known for known in names[:MOST_COMPARED] if len(known) <= LONGEST]
    nearest = [known for known in compared if name.endswith(f"_{known.rpartition('.')[2]}")]
    nearest = nearest or difflib.get_close_matches(name[:LONGEST], compared, n=1, cutoff=alike)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    few = [known if len(known) <= LONGEST else shown(known) for known in names[:MOST_NAMES]]
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    listed = f" (known: {', '.join(few) or 'none'}{more})" if not nearest or len(names) <= 12 else ""
    return InputError(f"unknown {kind} {shown(name)}{hint}{listed}")


def refused(name: str, value: object, expected: str) -> InputError:
    """The error for a setting's value."""
    return InputError(f"{name} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """A value as messages show it: its repr, with the middle of what is long left out."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
