"""Handling of Ctrl-C and SIGTERM while a study runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from basisadapt.core.command import tell


class Interrupt:
    """A context manager in which Ctrl-C and SIGTERM raise KeyboardInterrupt.

    They raise at once; inside `held`, at its end, unless a second signal comes first. Inside `patient`, the first
    Ctrl-C only sets `asked` and calls `finish`. Outside the main thread, where Python allows no handler, it does
    nothing.

    asked: whether Ctrl-C has asked for an end after the running cells.
    """

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        self._finish = finish
        self.asked = False
        self._patient = self._held = self._late = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                signal.SIGINT: signal.signal(signal.SIGINT, self._ctrl_c),
                signal.SIGTERM: signal.signal(signal.SIGTERM, self._now),
            }
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While cells run: their driver checks `asked`, and raises KeyboardInterrupt after them."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """One atomic step: a first signal raises KeyboardInterrupt only at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._late:
            self._late = False
            raise KeyboardInterrupt

    def _ctrl_c(self, number: int, frame: FrameType | None) -> None:
        if self._patient and not self.asked:
            self.asked = True
            tell("\nfinishing the cells that run; Ctrl-C again stops now")
            self._finish()
        else:
            self._now(number, frame)

    def _now(self, number: int, frame: FrameType | None) -> None:
        if self._late or not self._held:
            raise KeyboardInterrupt
        self._late = True
