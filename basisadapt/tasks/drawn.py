"""Tasks whose rows follow from the seed of a run, mostly drawn at random, so that nothing is held out."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np

from basisadapt.tasks.task import Rows, Task, TaskData


class SeededTask(Task):
    """A task with other rows for every seed of a run, which trains and evaluates on all of them.

    Choices for it, such as a learning rate, are made on other seeds and so on other rows.
    """

    comparable = False

    @abstractmethod
    def of_seed(self, seed: int, data_dir: Path | None) -> TaskData:
        """The rows that a run with this seed is trained on and measured by. Raises InputError."""

    def load(self, data_dir: Path | None) -> TaskData:
        """The rows of seed 0."""
        return self.of_seed(0, data_dir)


class DrawnTask(SeededTask):
    """A task that draws its rows."""

    @property
    @abstractmethod
    def drawn_as(self) -> str:
        """A description of what is drawn. Together with the seed it determines the rows."""

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Rows:
        """Draw the rows of one run from `generator` alone."""

    def check(self, data_dir: Path | None) -> None:
        """Nothing to check: the task reads no files."""

    def of_seed(self, seed: int, data_dir: Path | None = None) -> TaskData:
        """The rows that a run with this seed is trained and evaluated on."""
        rows = self.draw(np.random.default_rng(seed))
        return TaskData(rows, rows, mark=self.drawn_as)
