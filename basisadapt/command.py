"""What the command lines share: exit codes, and errors that are one line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NoReturn

from basisadapt.errors import InputError

DONE, UNSOUND, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser to which bad arguments are bad input like any other."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message} (--help lists the options)")


def say(text: str) -> None:
    """Tell the user the answer. Who has read enough of it and closed the pipe, as `head` does, is not bothered."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes as it ends


def complain(error: object) -> None:
    """Tell the user of an error."""
    print(f"basisadapt: error: {masked(str(error))}", file=sys.stderr)


def masked(text: str) -> str:
    """The text with the passwords of its URLs out of sight: postgresql://me:***@host/name."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
