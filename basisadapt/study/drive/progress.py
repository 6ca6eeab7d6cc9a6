"""What a user sees while cells run: a bar where stderr is a terminal, a line per cell where it is not."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from basisadapt.core.command import tell
from basisadapt.study.plan.cells import Cell


@dataclass
class _Running:
    name: str
    began: float
    step: str = ""


class Progress:
    """Counts cells, from `done` to `total`, and shows those that run."""

    def __init__(self, total: int, done: int) -> None:
        self._file = _Stderr()
        self._bar = tqdm(total=total, initial=done, unit="cell", file=self._file, disable=not sys.stderr.isatty())
        self._count, self._total = done, total
        self._running: dict[str, _Running] = {}
        self._waiting = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, cell: Cell) -> None:
        """A cell starts."""
        self._running[cell.key] = _Running(_name(cell), time.monotonic())
        self._show()

    def step(self, key: str, step: int, total: int) -> None:
        """A training step of the cell called `key` is done."""
        self._running[key].step = f" {step}/{total}"
        self._show()

    def again(self, cell: Cell, reason: str) -> None:
        """A cell that was cut off for `reason` is put back."""
        del self._running[cell.key]
        self._say(f"{_name(cell)}: {reason}; it is tried once more")

    def end(self, cell: Cell, shown: str) -> None:
        """A cell has come to its end."""
        seconds = time.monotonic() - self._running.pop(cell.key).began
        self._ended(f"{_name(cell)}: {shown} ({seconds:.0f} s)")

    def lost(self, cell: Cell) -> None:
        """A cell's run was closed by another process, which had seen no sign of life for too long."""
        del self._running[cell.key]
        self._say(f"{_name(cell)}: another process took this one for dead, and the cell over")

    def wait(self, cell: Cell) -> None:
        """Nothing can be done until another process has a cell, has given it up or has finished it."""
        text = waiting_for(cell)
        if self._bar.disable and text != self._waiting:
            self._say(text)
        self._waiting = text
        self._bar.set_description_str(text)

    def end_elsewhere(self, cell: Cell) -> None:
        """Another process has finished a cell."""
        self._ended(f"{_name(cell)}: finished by another process")

    def _ended(self, text: str) -> None:
        self._count += 1
        self._bar.update()
        if self._bar.disable:
            self._say(f"[{self._count}/{self._total}] {text}")

    def _show(self) -> None:
        self._bar.set_description_str("; ".join(running.name + running.step for running in self._running.values()))

    def _say(self, text: str) -> None:
        self._bar.write(text, file=self._file)


class _Stderr:
    """stderr as `tell` treats it."""

    def write(self, text: str) -> None:
        """Tell the text."""
        tell(text, end="")

    def flush(self) -> None:
        """It is told already."""


def waiting_for(cell: Cell) -> str:
    """What is said while another process is at a cell."""
    return f"waiting for another process to finish {_name(cell)}"


def _name(cell: Cell) -> str:
    return f"{cell.row}, seed {cell.seed}"
