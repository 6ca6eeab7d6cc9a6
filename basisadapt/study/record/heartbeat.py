"""The heartbeat of a driver, for drivers on other hosts or in other containers, which cannot see its process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import suppress

from basisadapt.study.record.record import Record
from basisadapt.study.record.stores import store_errors

BEAT = 20.0  # seconds between heartbeats
STOP_SECONDS = 10.0  # that the end of a thread is waited for, whose last heartbeat a lost server may hold up


class Heartbeat:
    """Between start() and stop(), records every BEAT seconds that the driver of the runs is alive.

    runs: returns the ids of the open runs; called in another thread.
    """

    def __init__(self, record: Record, runs: Callable[[], Collection[str]]) -> None:
        self._record, self._runs = record, runs
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait for its end, for at most STOP_SECONDS."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(*store_errors()):  # the driver itself reports a server that is down
                self._record.beat(self._runs())
