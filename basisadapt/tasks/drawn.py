"""Tasks whose rows follow from the seed of a run, mostly drawn at random: there is nothing to hold out."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np

from basisadapt.tasks.task import Rows, Task, TaskData


class SeededTask(Task):
    """A task with other rows for every seed of a run; all of them are trained on and all are evaluated.

    What is chosen for it, such as a rate, is chosen on other seeds, so on other rows.
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
        """What is drawn, in words: with the seed, all that the rows follow from."""

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> Rows:
        """The rows."""

    def check(self, data_dir: Path | None) -> None:
        """There are no files."""

    def of_seed(self, seed: int, data_dir: Path | None = None) -> TaskData:
        """The rows that follow from the seed."""
        rows = self.draw(np.random.default_rng(seed))
        return TaskData(rows, rows, mark=self.drawn_as)
