"""The contract of an executor, which runs jobs and returns how each of them ended."""

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

# Called with a job's key, its number of finished steps and that of all steps; 0 and 0 when the job starts.
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """A run to do. key: identifies it among the submitted jobs."""

    key: str
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The settings of all jobs of an executor.

    - `data_dir` (Path or None, default None): the folder of the tasks' data.
    - `plugins` (tuple of str, default empty): files and modules that a process loads before its first job.
    - `halve_batch` (bool, default False): repeat a job that ran out of memory with half the batch and twice the
      accumulation.
    - `timeout` (float > 0 or None, default None): seconds after which a job fails.
    - `compile` (bool, default False): train with compiled blocks (`training.compiled`).
    - `adapters` (Path or None, default None): a folder of this machine for the jobs' adapters, each in a folder with
      the name of the job's key.

    Raises InputError for a value out of range.
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
    """A job that ended with a result, or with an error and possibly its traceback. All are redacted."""

    key: str
    result: RunResult | None = None
    error: str = ""
    traceback: str = ""

    def __post_init__(self) -> None:
        for name in ("result", "error", "traceback"):
            object.__setattr__(self, name, redacted(getattr(self, name)))


@dataclass(frozen=True)
class Died:
    """A job whose process died, and the reason. It can be submitted again."""

    key: str
    reason: str


class Executor(ABC):
    """Runs up to `slots` jobs at once. A context manager, which stops all jobs at its end.

    It records nothing: the caller records the results, and must not submit more jobs than there are free slots.
    """

    here: ClassVar[bool] = True  # whether jobs run on this machine
    adapters: Path | None = None  # see `JobSettings`

    def prepare(self, parameters: int) -> None:
        """Raise InputError if no job could run. Called before anything is recorded, if there are jobs.

        parameters: the number of parameters of the jobs' largest model.
        """
        return

    @property
    @abstractmethod
    def slots(self) -> int:
        """The number of jobs that may run at once."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job; there must be a free slot."""

    @abstractmethod
    def wait(self, on_step: OnStep) -> Ended | Died:
        """Wait until a submitted job ends. Meanwhile `on_step` gets the steps of all jobs, if the executor sees them.

        After a KeyboardInterrupt, which passes through, the caller stops the jobs.
        """

    def release(self) -> None:
        """Hear that no job waits: processes that are idle may end, and give back their memory."""
        return

    def finish(self) -> None:
        """Hear, from a signal handler too, that the user wants no further job: one that hangs at work may die."""
        return

    @abstractmethod
    def stop(self) -> None:
        """Stop all jobs immediately."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
