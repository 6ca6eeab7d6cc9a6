"""What Ctrl-C and SIGTERM do while a study runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from basisadapt.core.command import tell


class Interrupt:
    """A context manager, in which Ctrl-C and SIGTERM raise KeyboardInterrupt: at once, or at the end of what is `held`,
    unless another one comes until then. While cells run, which is `patient`, the first Ctrl-C asks for an end after
    them, and `finish` is called. Outside of the main thread, where Python lets no one listen, it changes nothing.

    asked: whether a patient one has come.
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
        """While cells run. Whoever runs them looks at `asked` and raises KeyboardInterrupt after them."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is to be one step: it is interrupted by no first signal. Raises KeyboardInterrupt at its end then."""
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
