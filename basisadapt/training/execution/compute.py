"""Running one job in this process, and the executor that does so."""

from __future__ import annotations

import dataclasses
import gc
import traceback
from pathlib import Path

import torch

from basisadapt.core.errors import one_line
from basisadapt.methods import METHODS, PeftMethod
from basisadapt.training import running
from basisadapt.training.execution.executor import Ended, Executor, Job, JobSettings, OnStep


def compute(job: Job, settings: JobSettings, on_step: OnStep) -> Ended:
    """Run a job. Any Exception that it raises is returned as its error.

    With `halve_batch`, a job that runs out of memory is repeated with half the batch and twice the accumulation, so
    that a step has the same rows, until it fits or the batch cannot be halved.
    """
    accumulate = 1
    while True:
        batch = job.config.train.batch_size // accumulate
        try:
            result = running.run(
                job.config,
                data_dir=settings.data_dir,
                on_step=lambda step, total: on_step(job.key, step, total),
                save_to=_place_of_adapter(job, settings),
                accumulate=accumulate,
                compiled=settings.compile,
            )
        except Exception as error:
            full, reason = _is_out_of_memory(error), one_line(error)
            if not full or not settings.halve_batch or batch % (2 * job.config.train.processes):
                reason = f"out of memory with a batch of {batch} ({reason})" if full else reason
                return Ended(job.key, error=reason, traceback="".join(traceback.format_exception(error)))
        else:
            if accumulate > 1:
                note = f"out of memory with a batch of {2 * batch}: {accumulate} batches of {batch} were accumulated"
                result = dataclasses.replace(result, warnings=[*result.warnings, note])
            return Ended(job.key, result)
        accumulate *= 2
        gc.collect()  # only now has the error released the memory
        torch.cuda.empty_cache()


def _place_of_adapter(job: Job, settings: JobSettings) -> Path | None:
    """The folder for the job's adapter; None for methods without one."""
    if settings.adapters is None or not issubclass(METHODS[job.config.method], PeftMethod):
        return None
    return settings.adapters / job.key


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch raises a plain RuntimeError for host memory, and so do some CUDA libraries for device memory.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


class Inline(Executor):
    """Runs one job after the other in this process."""

    slots = 1

    def __init__(self, settings: JobSettings) -> None:
        self._settings, self.adapters = settings, settings.adapters
        self._job: Job | None = None

    def submit(self, job: Job) -> None:
        """Keep the job for `wait`."""
        self._job = job

    def wait(self, on_step: OnStep) -> Ended:
        """Run the job."""
        assert self._job is not None, "nothing was submitted"
        on_step(self._job.key, 0, 0)
        return compute(self._job, self._settings, on_step)

    def stop(self) -> None:
        """Do nothing: no job runs outside `wait`."""
