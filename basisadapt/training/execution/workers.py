"""The executor that runs jobs in child processes, which it kills and replaces if necessary."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from basisadapt.core.command import tell
from basisadapt.core.errors import InputError, one_line, require
from basisadapt.training.compiled import check_compiler
from basisadapt.training.execution.compute import Inline
from basisadapt.training.execution.executor import Died, Ended, Executor, Job, JobSettings, OnStep
from basisadapt.training.execution.json_lines import end_from_mapping, to_line
from basisadapt.training.execution.machine import accelerated, cores, free_memory, gpus
from basisadapt.training.execution.scratch import Scratch, remove_left

START_SECONDS = 120.0  # for a process to start; a longer --timeout extends it
END_SECONDS = 10.0  # for a process to end after it has closed its stdout
THREADS = 1  # of a cell, see `local_executor`
PROCESS_BYTES, PARAMETER_BYTES = 1 << 30, 12  # memory for a process, and for each parameter of its model


class Workers(Executor):
    """Up to `count` processes, each with one job at a time; a process is reused for the next job.

    A process is `python -m basisadapt.training -`, see `worker.py`, in its own process group, so that a terminal's
    Ctrl-C does not reach it. The processes take turns on the GPUs.

    threads: of each process (OMP_NUM_THREADS, unless it is set); `count` is then reduced to what memory allows. None
    keeps `count` and divides the cores.
    """

    def __init__(self, count: int, settings: JobSettings, threads: int | None = None) -> None:
        self._count, self._settings, self.adapters = count, settings, settings.adapters
        self._bounded, self._threads = threads is not None, threads or max(1, cores() // count)
        self._workers: list[_Worker] = []
        self._said: queue.SimpleQueue[tuple[_Worker, str | None]] = queue.SimpleQueue()

    def prepare(self, parameters: int) -> None:
        """Reduce the number of processes to what memory allows, unless the user has chosen it."""
        if self._bounded:
            self._count = max(1, min(self._count, free_memory() // (PROCESS_BYTES + PARAMETER_BYTES * parameters)))

    @property
    def slots(self) -> int:
        """One per process."""
        return self._count

    def submit(self, job: Job) -> None:
        """Give the job to an idle process, or start one."""
        worker = next((worker for worker in self._workers if worker.job is None), None) or self._start()
        worker.job, worker.at_work = job.key, False
        if self._settings.timeout is not None:
            worker.deadline = time.monotonic() + self._starting()
        assert worker.process.stdin is not None
        with suppress(BrokenPipeError):  # it died without a job, as wait() will see
            worker.process.stdin.write(to_line({"key": job.key, "config": job.config.to_mapping()}))
            worker.process.stdin.flush()

    def wait(self, on_step: OnStep) -> Ended | Died:
        """Read what the workers say until a job ends, runs out of time, or loses its process."""
        while True:
            if (late := self._late()) is not None:
                self._remove(late)
                limit = f"the {self._settings.timeout:g} s of --timeout" if late.at_work else f"{self._starting():g} s"
                return Ended(late.job or "", error=f"took longer than {limit}{'' if late.at_work else ' to start'}")
            try:
                worker, line = self._said.get(timeout=self._patience())
            except queue.Empty:
                continue
            if worker not in self._workers:
                continue  # output of a process that was killed
            if line is None:
                with suppress(subprocess.TimeoutExpired):  # it has closed its stdout
                    worker.process.wait(END_SECONDS)
                self._remove(worker)
                if worker.job is not None:
                    return Died(worker.job, f"its process {worker.end()}")
                continue
            said = _event(line)
            if said is None:
                tell(line, end="")
            elif said["event"] == "began":
                worker.begin(self._settings.timeout)
                on_step(said["key"], 0, 0)
            elif said["event"] == "step":
                on_step(said["key"], said["step"], said["total"])
            elif said["event"] == "ended":
                worker.job = worker.deadline = None
                return end_from_mapping(said["key"], said)

    def release(self) -> None:
        """End the idle processes, which keep their models and a GPU's memory as long as they live."""
        for worker in [worker for worker in self._workers if worker.job is None]:
            self._remove(worker)

    def finish(self) -> None:
        """Pass a Ctrl-C on to the processes at work, which end where a judge hangs (`tasks.asking`)."""
        for worker in self._workers:
            if worker.at_work:  # before, it does not know what to do with it
                worker.process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Kill every process."""
        for worker in list(self._workers):
            self._remove(worker)

    def _starting(self) -> float:
        """The seconds in which a process must start and load plug-ins, if there is a --timeout."""
        return max(START_SECONDS, self._settings.timeout or 0.0)

    def _start(self) -> _Worker:
        place = min(set(range(self._count)) - {worker.place for worker in self._workers})
        if not self._workers:
            remove_left()
        try:
            scratch = Scratch()
            worker = _Worker(place, scratch, _start_process(self._threads, place, scratch.path, self._settings))
        except OSError as error:  # not the record's, nor the results': a full temporary folder, too many processes
            raise InputError(f"no process can be started for a cell: {one_line(error)}") from error
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            if line.strip():
                self._said.put((worker, line))
        self._said.put((worker, None))

    def _late(self) -> _Worker | None:
        now = time.monotonic()
        return next((worker for worker in self._workers if worker.deadline is not None and worker.deadline < now), None)

    def _patience(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


@dataclass(eq=False)
class _Worker:
    """A worker process.

    - `place` (int): its number among the workers.
    - `scratch`: the folder of its temporary files.
    - `process`: the process.
    - `job` (str or None): the key of its job.
    - `at_work` (bool): the job has begun.
    - `deadline` (float or None): the time (`time.monotonic`) by which it must begin or end.
    """

    place: int
    scratch: Scratch
    process: subprocess.Popen[str]
    job: str | None = None
    at_work: bool = False
    deadline: float | None = None

    def begin(self, timeout: float | None) -> None:
        """Note that the job has begun, which may take `timeout` seconds."""
        self.at_work = True
        self.deadline = None if timeout is None else time.monotonic() + timeout

    def kill(self) -> None:
        """Kill the process and all of its children."""
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.scratch.remove()

    def end(self) -> str:
        """How the process ended, in words."""
        code = self.process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"was killed ({name}{hint})"


def _event(line: str) -> dict[str, Any] | None:
    """A worker's event; None for other output, such as a site hook's before the worker redirects its stdout."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) and "event" in said else None


def _start_process(threads: int, place: int, folder: Path, settings: JobSettings) -> subprocess.Popen[str]:
    arguments = ["-m", "basisadapt.training", "-", *(f"--plugin={plugin}" for plugin in settings.plugins)]
    arguments += [] if settings.data_dir is None else [f"--data-dir={settings.data_dir}"]
    arguments += ["--halve-batch"] if settings.halve_batch else []
    arguments += ["--compile"] if settings.compile else []
    arguments += [] if settings.adapters is None else [f"--adapters={settings.adapters}"]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "TMPDIR": str(folder)}
    if devices := gpus():
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def local_executor(workers: int | None, settings: JobSettings) -> Executor:
    """The executor with `workers` processes, which divide the cores; for None with as many processes as help.

    On a CPU these are as many as cores and memory allow, each with one thread, or OMP_NUM_THREADS if it is set. The
    number of concurrent cells then changes no result, and no thread waits for one that another process delays
    (`benchmarks/cell_threads.py`). A single process with these threads may be this one. With an accelerator it is this
    process, or a child if a job that takes too long has to be stopped. Raises InputError for fewer than one.
    """
    require(workers is None or workers >= 1, "--workers", workers, "at least 1")
    if settings.compile:
        check_compiler()
    if workers is not None:
        return Workers(workers, settings)
    if accelerated():
        return Inline(settings) if settings.timeout is None else Workers(1, settings)
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else THREADS
    count = max(1, cores() // threads)
    if count == 1 and threads == torch.get_num_threads() and settings.timeout is None:
        return Inline(settings)
    return Workers(count, settings, threads)
