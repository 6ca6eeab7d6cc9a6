"""The contract of an executor: it runs jobs somewhere, and says how each of them ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from basisadapt.core.errors import InputError
from basisadapt.core.redaction import redacted

if TYPE_CHECKING:
    from basisadapt.training.config import RunConfig
    from basisadapt.training.result import RunResult

# A job's key, how many steps are done, and of how many; 0 of 0 as it begins, where that can be seen.
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """A run to do. key: what it is called until its end; no other job at work has the same."""

    key: str
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What holds for every job of an executor.

    data_dir: the tasks' data. plugins: files and modules that a process loads before its first job. halve_batch: repeat
    a job that ran out of memory with half the batch and twice the accumulation. timeout: seconds that a job may take.
    compile: train with compiled blocks (`training.compiled`). adapters: a folder of this machine in which jobs leave
    their adapters, in folders called by their keys. Raises InputError out of range.
    """

    data_dir: Path | None = None
    plugins: tuple[str, ...] = ()
    halve_batch: bool = False
    timeout: float | None = None
    compile: bool = False
    adapters: Path | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"--timeout must be above 0 seconds, got {self.timeout:g}")


@dataclass(frozen=True)
class Ended:
    """A job that came to its end: with a result, or with an error and, where there is one, its traceback.

    None of them holds a secret of this process.
    """

    key: str
    result: RunResult | None = None
    error: str = ""
    traceback: str = ""

    def __post_init__(self) -> None:
        for name in ("result", "error", "traceback"):
            object.__setattr__(self, name, redacted(getattr(self, name)))


@dataclass(frozen=True)
class Died:
    """A job whose process is gone, and why. It may be submitted again."""

    key: str
    reason: str


class Executor(ABC):
    """Runs up to `slots` jobs at once. A context manager, at whose end nothing runs any more.

    It knows no record: who submits jobs writes down what comes of them, and keeps to the slots.
    """

    here: ClassVar[bool] = True  # whether jobs run on this machine
    adapters: Path | None = None  # see `JobSettings`

    def prepare(self, parameters: int) -> None:
        """Raise InputError where no job could be run. Called before anything is recorded, if there are jobs.

        parameters: of the largest of their models.
        """
        return

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many jobs may be submitted and not ended."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Take a job; there must be a free slot."""

    @abstractmethod
    def wait(self, on_step: OnStep) -> Ended | Died:
        """Wait until a submitted job ends; meanwhile tell the steps of all jobs to `on_step`, where they can be seen.

        A KeyboardInterrupt passes through; the jobs are then to be stopped.
        """

    def finish(self) -> None:
        """Hear, from a signal handler too, that the user wants no further job: one that hangs at work may die."""
        return

    @abstractmethod
    def stop(self) -> None:
        """Stop all jobs, at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
