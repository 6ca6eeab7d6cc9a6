"""Tasks whose rows are drawn at random, so that nothing is read and nothing is held out."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np

from basisadapt.tasks.task import Rows, Task, TaskData


class DrawnTask(Task):
    """A task that draws new rows for every seed of a run, and trains and evaluates on all of them.

    Choices for it, such as a learning rate, are made on other seeds and so on other rows.
    """

    comparable = False

    @property
    @abstractmethod
    def drawn_as(self) -> str:
        """A description of what is drawn. Together with the seed it determines the rows."""

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Rows:
        """Draw the rows of one run from `generator` alone."""

    def check(self, data_dir: Path | None) -> None:
        """Nothing to check: the task reads no files."""

    def load(self, data_dir: Path | None) -> TaskData:
        """The rows of seed 0; a run uses `of_seed` with its own."""
        return self.of_seed(0)

    def of_seed(self, seed: int) -> TaskData:
        """The rows that a run with this seed is trained and evaluated on."""
        rows = self.draw(np.random.default_rng(seed))
        return TaskData(rows, rows, mark=self.drawn_as)
