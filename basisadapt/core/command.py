"""What the command lines share: exit codes, one-line errors, and output without secrets."""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO, cast

from basisadapt.core.errors import InputError, nearest
from basisadapt.core.redaction import hide_in, redacted

# Characters that control a terminal, and marks that change the direction of writing.
CONTROLS = [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"]
TURNING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
STEERING = {**{code: f"\\x{code:02x}" for code in CONTROLS}, **{code: f"\\u{code:04x}" for code in TURNING}}
DONE, HAS_FAILURES, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError for bad arguments, as all other bad input does.

    setting: finds the key of the setting of a name, or None, where settings are given with --set. Default: finds none.
    """

    def __init__(self, *args: Any, setting: Callable[[str], str | None] = lambda name: None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._setting = setting

    def add_plugins(self, about: str) -> None:
        """Add --plugin, which may be given several times; about: its help."""
        self.add_argument("--plugin", action="append", default=[], metavar="FILE_OR_MODULE", help=about)

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message, instead of printing it and exiting."""
        raise InputError(f"{message} (--help lists the options)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The parsed arguments. Raises InputError for any that is left over, with the nearest setting or option."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            raise InputError(f"unrecognized arguments: {' '.join(rest)}; {self._hint(rest[0].partition('=')[0])}")
        return found

    def _hint(self, option: str) -> str:
        if not option.startswith("-"):
            return "--help says what is expected"
        if key := self._setting(option.lstrip("-").replace("-", "_")):
            return f"settings are given as --set {key}=VALUE"
        near = nearest(option, [name for name in self._option_string_actions if name.startswith("--")], alike=0.7)
        return f"did you mean {near!r}?" if near else "--help lists the options"


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks which words may follow, where argcomplete is installed; the process then ends."""
    if "_ARGCOMPLETE" in os.environ:
        with suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)


def say(text: str) -> None:
    """Print an answer to stdout. A reader that has closed the pipe, as `head` does, causes no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes as it ends


def tell(text: str, end: str = "\n") -> None:
    """Print progress and errors to stderr. A closed stderr causes no error."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except RuntimeError:
        return  # a signal handler printed while another print was under way
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def print_error(error: object) -> None:
    """Print an error to stderr, as "basisadapt: error: ...", in one line."""
    tell(f"basisadapt: error: {error}")


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The rows as lines with columns of equal width: those in `left` begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if place in left else str.rjust for place in range(len(widths))]
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip() for row in rows
    ]


def guarded(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """`main`, a function of its arguments that returns an exit code, with everything it prints made safe.

    Answers, errors, progress and tracebacks lose their secrets and their terminal control characters. Called without
    arguments, the result uses those of the process. It returns BAD_INPUT for an InputError, which is printed, and where
    a package is not installed, and HAS_FAILURES, after a traceback, for any other exception.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        for argument in arguments:
            hide_in(argument)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without ± or φ still gets its table
        out, err = (cast(TextIO, _Guarded(stream)) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                return main(arguments)
            except InputError as error:
                print_error(error)
                return BAD_INPUT
            except Exception as error:
                if isinstance(error, ModuleNotFoundError) and not (error.name or "basisadapt").startswith("basisadapt"):
                    print_error(f"this needs {error.name}, which is not installed: pip install 'basisadapt[lab]'")
                    return BAD_INPUT
                traceback.print_exc()  # printed here, since the interpreter's own would not be redacted
                return HAS_FAILURES

    return run


class _Guarded:
    """A stream that writes texts without secrets and with terminal control characters escaped.

    Labels, file names and error messages come from others and may hold either. All else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_inert(redacted(text)))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _inert(text: str) -> str:
    """The text with terminal control characters escaped.

    Tabs and line feeds stay, and so do carriage returns at either end, with which a progress bar overwrites itself.
    """
    bare = text.strip("\r")
    begin = len(text) - len(text.lstrip("\r")) if bare else len(text)
    return text[:begin] + bare.translate(STEERING) + text[begin + len(bare) :]
