"""Signs of life of a driver, for drivers on other hosts or in other containers, who cannot see its process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import suppress

from basisadapt.study.record.record import BEAT, Record
from basisadapt.study.record.stores import store_errors


class Heartbeat:
    """While it is on, the record is told every BEAT seconds that the driver of the runs lives.

    runs: gives the runs that are at work, at any time and in another thread.
    """

    def __init__(self, record: Record, runs: Callable[[], Collection[str]]) -> None:
        self._record, self._runs = record, runs
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; the last sign is given when this returns."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(*store_errors()):  # of a server that is away for a while the driver itself will tell
                self._record.beat(self._runs())
