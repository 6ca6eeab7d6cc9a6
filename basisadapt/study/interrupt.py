"""What Ctrl-C and SIGTERM do while a study runs."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupt:
    """A context manager, in which the first Ctrl-C asks for an end after the cells that run, and the next one, as any
    SIGTERM, raises KeyboardInterrupt. Outside of the main thread, where Python lets no one listen, it changes nothing.

    asked: whether the first has come.
    """

    def __init__(self) -> None:
        self.asked = False
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

    def _ctrl_c(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing the cells that run; Ctrl-C again stops now", file=sys.stderr, flush=True)

    def _now(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
