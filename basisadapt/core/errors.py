"""Errors that users are meant to read: their types, the nearest valid choice, and values shortened for a message."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

LONGEST = 100  # characters of a value in a message
MAX_NAMES, MAX_COMPARED = 40, 10_000  # names that are listed, and names searched for the nearest one

_short = reprlib.Repr()
_short.maxstring = _short.maxother = LONGEST
_short.maxlong, _short.maxlevel = 40, 4


class InputError(ValueError):
    """The user asked for something that cannot be done. The message is one line: what was wrong, what was expected."""


class RecordError(Exception):
    """A result cannot be recorded. Existing records are unchanged. The message is one line."""


def unknown(kind: str, name: object, known: Iterable[str], alike: float = 0.5, meant: str | None = None) -> InputError:
    """The error for a `name` that is not among the `known` names of a `kind`, such as "basis", with the nearest one.

    The nearest one is what is `meant` if that is known, else `nearest`. The known names are listed if there is none or
    there are at most 12.
    """
    names = sorted(known)
    name = str(name) if isinstance(name, str | int | float) else shown(name)
    near = meant if meant in names else nearest(name, names, alike)
    hint = f"; did you mean {near!r}?" if near else ""
    few = [known if len(known) <= LONGEST else shown(known) for known in names[:MAX_NAMES]]
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    listed = f" (known: {', '.join(few) or 'none'}{more})" if not near or len(names) <= 12 else ""
    return InputError(f"unknown {kind} {shown(name)}{hint}{listed}")


def nearest(name: str, known: Sequence[str], alike: float) -> str | None:
    """The known name that ends `name`, as dropout ends lora_dropout, or is `alike`, a similarity from 0 to 1.

    Of a name with dots, what follows the last one may be meant: train.epochs by epoch.
    """
    compared = [one for one in known[:MAX_COMPARED] if len(one) <= LONGEST]
    ends = [one for one in compared if name.endswith(f"_{one.rpartition('.')[2]}")]
    if ends:
        return ends[0]
    short = {one.rpartition(".")[2]: one for one in reversed(compared)} | {one: one for one in compared}
    return next((short[one] for one in difflib.get_close_matches(name[:LONGEST], short, n=1, cutoff=alike)), None)


def refused(name: str, value: object, expected: str) -> InputError:
    """The error for a setting's value: "`name` must be `expected`, got `value`"."""
    return InputError(f"{name} must be {expected}, got {shown(value)}")


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise InputError, with the message of `refused`, unless `holds`."""
    if not holds:
        raise refused(name, value, expected)


@contextmanager
def refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an OSError, or an error of one of other `kinds`, into an InputError: "`what`: its message"."""
    kinds = kinds or (OSError,)
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {getattr(error, 'strerror', None) or error}") from error


def shown(value: object) -> str:
    """The repr of a value, for a message; the middle of a long one is left out."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def one_line(error: BaseException) -> str:
    """The type and message of an exception in one line, such as "KeyError: 'x'"."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
