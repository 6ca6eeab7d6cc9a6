"""What users hang on a study, such as a logger of their own: it is told how every cell ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from basisadapt.core.command import tell
from basisadapt.core.errors import one_line
from basisadapt.core.registry import Registry

if TYPE_CHECKING:
    from basisadapt.study.plan.cells import Cell
    from basisadapt.training import RunResult

CALLBACKS: Registry[Callback] = Registry("callback")


class Callback(ABC):
    """Told of cells as they end, in the process that drives the study. Subclass it and define `on_end`.

    An object is given to `study.run(callbacks=[...])`; of a class with a name, in a plug-in, one is made for every
    invocation. One that raises is told no more, and the study goes on.
    """

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under `name`. Raises InputError if it is taken."""
        super().__init_subclass__(**kwargs)
        if name is not None:
            CALLBACKS.add(name, cls)

    @abstractmethod
    def on_end(self, cell: Cell, result: RunResult | None, error: str) -> None:
        """A cell has been run, and recorded. cell: its row, seed and configuration. result: None where it failed, for
        the reason in `error`."""


class Callbacks:
    """Those of one invocation: the given ones, then one of each class that is registered."""

    def __init__(self, given: Sequence[Callback] = ()) -> None:
        self._told = [*given, *(CALLBACKS[name]() for name in CALLBACKS)]

    def on_end(self, cell: Cell, result: RunResult | None, error: str) -> None:
        """Tell them all."""
        for callback in list(self._told):
            try:
                callback.on_end(cell, result, error)
            except Exception as reason:  # a stranger's code: whatever it raises, the study must go on
                self._told.remove(callback)
                tell(f"{type(callback).__name__} is told no more: {one_line(reason)}")
