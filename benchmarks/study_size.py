"""What a study's size costs: seconds, memory and bytes of `--report`, its page and `--dry-run`, at few and many cells.

Two shapes of study: five seeds a row, and one. One cell's result, drawn at random in the form and size that the phi
adapter of the embedded backbone gives (36 modules), is recorded as the engine does; the record's rows are then copied
for the other cells, with a score of their own. The aims, at 10,000 cells: 20 s a command, 300 MB more than an empty
record takes, and a page of at most 10 MB. The exit code is 1 where one is missed.

    python benchmarks/study_size.py [--cells 1000 10000]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from study_engine import drawn_result

from basisadapt.core.environment import environment
from basisadapt.diagnostics.figures import pictures
from basisadapt.study.plan.cells import Cell, resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.record import Record
from basisadapt.study.record.runs import CELL, ROW

STUDY = """
title: The cost of a large study
question: How long does a report take?
base: {{task: docstrings, backbone: minilm, method: phi, adapter: {{r: 4}}}}
sweep:
  basis: [sinc, gaussian_rbf, bspline, fourier, polynomial]
  train.lr: {rates}
reference: basis=sinc
seeds: {seeds}
claims:
  - {{text: Sincs are better than polynomials, better: "sinc, 0.001", than: "polynomial, 0.001"}}
"""
BASES = 5
AIM_SECONDS, AIM_MEMORY, AIM_PAGE = 20.0, 300.0, 10.0  # seconds, MB and MB


class Cost(NamedTuple):
    """Of one command: seconds and its greatest memory in MB."""

    seconds: float
    memory: float


def write_study(name: str, cells: int, seeds: int) -> list[Cell]:
    """Write a study of so many cells to `name`.yaml. Returns them."""
    rates = [round(0.001 * (1 + number / 1000), 6) for number in range(cells // (BASES * seeds))]
    Path(f"{name}.yaml").write_text(STUDY.format(rates=rates, seeds=list(range(1, seeds + 1))))
    return list(resolve(read_spec(f"{name}.yaml")).cells)


def fill(name: str, cells: Sequence[Cell]) -> None:
    """Enter the result of the first cell as the engine does, and copy it to the others."""
    record = Record("sqlite:///mlflow.db", name)
    parent = record.begin(read_spec(f"{name}.yaml"), {})
    run_id, result = record.start(parent, cells[0]), drawn_result(0)
    assert run_id is not None
    record.finish(run_id, cells[0], result, pictures(cells[0].row, result.__dict__))
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("PRAGMA synchronous=OFF")
        copies = [(uuid.uuid4().hex, cell) for cell in cells[1:]]
        _copy(database, "runs", run_id, [(new, {}) for new, _ in copies])
        for key, of in {CELL: lambda cell: cell.key, ROW: lambda cell: cell.row}.items():
            _copy(database, "tags", run_id, [(new, {"value": of(cell)}) for new, cell in copies], f"key = '{key}'")
        _copy(database, "tags", run_id, [(new, {}) for new, _ in copies], f"key NOT IN ('{CELL}', '{ROW}')")
        draw = random.Random(0)
        scores = [(new, {"value": draw.uniform(0.5, 0.7)}) for new, _ in copies]
        _copy(database, "latest_metrics", run_id, scores, "key = 'accuracy'")
        _copy(database, "latest_metrics", run_id, [(new, {}) for new, _ in copies], "key != 'accuracy'")
        database.commit()
    record.close(parent, "finished")


Copies = Sequence[tuple[str, dict[str, object]]]


def _copy(database: sqlite3.Connection, table: str, run_id: str, copies: Copies, where: str = "1") -> None:
    """Copy a run's lines of a table to other runs. copies: the new run's id, and what is different in it."""
    columns = [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]
    lines = database.execute(f"SELECT * FROM {table} WHERE run_uuid = ? AND {where}", (run_id,)).fetchall()
    marks = ", ".join("?" for _ in columns)
    database.executemany(
        f"INSERT INTO {table} VALUES ({marks})",
        (
            [{"run_uuid": new, **changed}.get(name, value) for name, value in zip(columns, line, strict=True)]
            for new, changed in copies
            for line in lines
        ),
    )


def cost_of(*arguments: str) -> Cost:
    """What a call of the command line takes, in a process of its own."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "basisadapt.study", *arguments], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"study {arguments} ended with {process.returncode}")
    return Cost(time.perf_counter() - began, usage.ru_maxrss / (1e6 if platform.system() == "Darwin" else 1e3))


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[1000, 10000], help="cells of the studies")
    options = parser.parse_args()
    versions = {name: environment()[name] for name in ("git_commit", "mlflow")}
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}\n")
    missed = False
    empty = cost_of("--dry-run", "ablate_basis")
    print(f"no cell: --dry-run {empty.seconds:.1f} s, {empty.memory:.0f} MB")
    for cells in options.cells:
        for seeds in (5, 1):
            name = f"size_{cells}_{seeds}"
            fill(name, write_study(name, cells, seeds))
            for command in (["--dry-run", f"{name}.yaml"], ["--report", f"{name}.yaml", "--output", name]):
                cost = cost_of(*command)
                more = cost.memory - empty.memory
                missed |= cost.seconds > AIM_SECONDS or more > AIM_MEMORY
                print(f"{cells} cells, {seeds} a row: {command[0]} {cost.seconds:.1f} s, {more:+.0f} MB", flush=True)
            page = (Path(name) / "report.html").stat().st_size / 1e6
            missed |= page > AIM_PAGE
            print(f"{cells} cells, {seeds} a row: page {page:.1f} MB")
    return int(missed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.exit(main())
