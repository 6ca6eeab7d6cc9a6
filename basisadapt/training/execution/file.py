"""Runs the cells of a file, and appends their results to another file."""

from __future__ import annotations

import collections
import dataclasses
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from basisadapt.core.command import tell
from basisadapt.core.errors import InputError, refusing
from basisadapt.training import planning
from basisadapt.training.config import RunConfig
from basisadapt.training.execution.executor import Ended, Executor, Job
from basisadapt.training.execution.json_lines import CellLine, LineFile, ResultLine, brief, end_to_mapping, read_lines


def run_file(cells: Path, output: Path, executor: Executor, data_dir: Path | None, without_arrays: bool) -> bool:
    """Run the cells that have no result in `output` yet, and append their results. Returns whether all have finished.

    without_arrays: write `brief` results. Raises InputError before anything runs, and OSError if a result cannot be
    written.
    """
    lines = {line.key: line for line in read_lines(cells, CellLine, "CELLS")}
    known = read_lines(output, ResultLine, "--output") if output.exists() else []
    states = {line.key: line.result["status"] for line in known if line.result is not None}
    jobs, parameters = _checked([line for key, line in lines.items() if key not in states], data_dir)
    executor.prepare(parameters)
    results = LineFile(output, "--output")
    with executor:
        for began, ended in _run(jobs, executor):
            line = lines[ended.key]
            if without_arrays and ended.result is not None:
                ended = dataclasses.replace(ended, result=brief(ended.result))
            cell, end = dataclasses.asdict(line), end_to_mapping(ended)
            host, now = socket.gethostname(), time.time()
            results.append(ResultLine(**cell, **end, host=host, began=began, ended=now))
            states[ended.key] = "failed" if ended.result is None else ended.result.status
            done, shown = len(lines.keys() & states.keys()), f"failed: {ended.error}" if ended.error else "finished"
            tell(f"[{done}/{len(lines)}] {line.row}, seed {line.config['seed']}: {shown}")
    return all(states[key] == "finished" for key in lines)


def _checked(lines: Iterable[CellLine], data_dir: Path | None) -> tuple[list[Job], int]:
    """The lines as jobs, each row checked against its model and data; and the largest model's number of parameters."""
    jobs, rows, largest = [], set(), 0
    for line in lines:
        with refusing(f"cell {line.key} ({line.row})", InputError):
            config = RunConfig.from_mapping(line.config)
            if line.row not in rows:
                largest = max(largest, planning.plan(config, data_dir).total)
        rows.add(line.row)
        jobs.append(Job(line.key, config))
    return jobs, largest


def _run(jobs: Iterable[Job], executor: Executor) -> Iterator[tuple[float, Ended]]:
    """When each job began, in seconds since 1970, and how it ended. A job whose process dies is repeated once."""
    waiting, dead = collections.deque(jobs), set()
    running: dict[str, tuple[Job, float]] = {}
    while waiting or running:
        while waiting and len(running) < executor.slots:
            job = waiting.popleft()
            running[job.key] = job, time.time()
            executor.submit(job)
        if not waiting:
            executor.release()
        end = executor.wait(lambda *_: None)
        job, began = running.pop(end.key)
        if isinstance(end, Ended):
            yield began, end
        elif job.key in dead:
            yield began, Ended(job.key, error=f"{end.reason}, twice")
        else:
            dead.add(job.key)
            waiting.append(job)
            tell(f"cell {job.key}: {end.reason}; it is tried once more")
