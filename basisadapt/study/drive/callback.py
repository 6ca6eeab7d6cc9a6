"""Callbacks: a user's own code, such as a logger, that a study calls as each cell ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from basisadapt.core.command import tell
from basisadapt.core.errors import one_line
from basisadapt.core.registry import Registered, Registry
from basisadapt.study.plan.cells import Cell
from basisadapt.training import RunResult

CALLBACKS: Registry[Callback] = Registry("callback")


class Callback(Registered, ABC):
    """Called as each cell ends, in the process that drives the study. Subclass it and define `on_end`.

    Pass an object to `study.run(callbacks=[...])`, or give the class a name in a plug-in: every invocation then makes
    one. The study continues without a callback that raises.
    """

    registry = CALLBACKS

    @abstractmethod
    def on_end(self, cell: Cell, result: RunResult | None, error: str) -> None:
        """Called after a cell is recorded.

        cell: its row, seed and configuration.
        result: its result, or None if it failed.
        error: why it failed, else "".
        """


class Callbacks:
    """The callbacks of one invocation: the given ones, then one of each registered class."""

    def __init__(self, given: Sequence[Callback] = ()) -> None:
        self._callbacks = [*given, *(CALLBACKS[name]() for name in CALLBACKS)]

    def on_end(self, cell: Cell, result: RunResult | None, error: str) -> None:
        """Call each of them."""
        for callback in list(self._callbacks):
            try:
                callback.on_end(cell, result, error)
            except Exception as reason:  # a user's code may raise anything
                self._callbacks.remove(callback)
                tell(f"{type(callback).__name__} is not called again: {one_line(reason)}")
