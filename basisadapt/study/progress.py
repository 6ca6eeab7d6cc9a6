"""What a user sees while cells run: a bar where stderr is a terminal, a line per cell where it is not."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from basisadapt.study.cells import Cell


class Progress:
    """Counts cells, from `done` to `total`."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit="cell", file=sys.stderr, disable=not sys.stderr.isatty())
        self._count, self._total, self._began = done, total, 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, cell: Cell) -> None:
        """A cell starts."""
        self._began = time.monotonic()
        self._bar.set_description_str(f"{cell.row}, seed {cell.seed}")

    def wait(self, cell: Cell) -> None:
        """Nothing is left but what another process runs."""
        text = f"waiting for another process to finish {cell.row}, seed {cell.seed}"
        if self._bar.disable and text != self._bar.desc:
            print(text, file=sys.stderr, flush=True)
        self._bar.set_description_str(text)

    def step(self, step: int, total: int) -> None:
        """A training step is done."""
        self._bar.set_postfix_str(f"step {step}/{total}")

    def end(self, cell: Cell, shown: str) -> None:
        """A cell has come to its end."""
        self._count += 1
        self._bar.update()
        if self._bar.disable:
            seconds = time.monotonic() - self._began
            line = f"[{self._count}/{self._total}] {cell.row}, seed {cell.seed}: {shown} ({seconds:.0f} s)"
            print(line, file=sys.stderr, flush=True)
