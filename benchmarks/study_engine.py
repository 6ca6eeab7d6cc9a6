"""What a study costs beside its training: seconds per cell at few and at many recorded cells, and of a report.

Training is replaced by results drawn at random, of the form and size that the phi adapter of the embedded backbone
gives (36 modules). The aims: at most 1.0 s a cell, at most 20 % more with 1,000 cells in the record than with 10, and
a report on 1,000 cells within 20 s. The exit code is 1 where one is missed.

    python benchmarks/study_engine.py [--cells 10 1000] [--measured 20]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from basisadapt.core.environment import environment
from basisadapt.study.__main__ import main as study
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.record.record import Record
from basisadapt.training import RunResult, running

STUDY = """
title: The cost of a study
question: How long does the engine take?
base: {task: docstrings, backbone: minilm, method: phi, adapter: {r: 4}}
sweep: {basis: [sinc, gaussian_rbf, bspline, fourier, polynomial]}
reference: sinc
"""
ROWS = 5
PROJECTIONS = [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
MODULES = [
    f"bert.encoder.layer.{layer}.{name}"
    for layer in range(6)
    for name in (*PROJECTIONS, "intermediate.dense", "output.dense")
]
NUMBERS = ["stable_rank", "dc_share", "active_n", "utilisation", "omega_mean", "omega_std", "alpha_mean", "alpha_std"]
NUMBERS += ["alpha_mean_abs", "range_share"]
AIM_SECONDS, AIM_GROWTH, AIM_REPORT = 1.0, 1.2, 20.0


def drawn_result(seed: int) -> RunResult:
    """A result of 100 steps, all numbers drawn."""
    draw = np.random.default_rng(seed)

    def phi() -> dict[str, dict[str, list[float]]]:
        z = np.linspace(-0.1, 0.1, 65)
        return {module: {"z": z.tolist(), "phi": draw.normal(size=65).tolist()} for module in MODULES}

    def ranks() -> dict[str, float]:
        return dict(zip(MODULES, draw.uniform(1, 3, len(MODULES)).tolist(), strict=True))

    metrics = ["eval_loss", "train_loss", "stable_rank.mean", "dc_share.mean", "parameters.trainable"]
    metrics += [f"metric.{number}" for number in range(20)]
    return RunResult(
        status="finished",
        headline="accuracy",
        metrics={"accuracy": draw.uniform(0.5, 0.7), **dict(zip(metrics, draw.uniform(size=25).tolist(), strict=True))},
        curves={
            "loss": [(step, 2 / step**0.5) for step in range(1, 101)],
            "update_smoothness": [(step, 0.5) for step in range(1, 101)],
            "stable_rank.attention": [(step, 1.5) for step in (0, 10, 50, 100)],
            "stable_rank.mlp": [(step, 1.5) for step in (0, 10, 50, 100)],
        },
        modules={
            module: {
                "kind": "attention" if ".attention." in module else "mlp",
                **dict(zip(NUMBERS, draw.uniform(0.1, 1, len(NUMBERS)).tolist(), strict=True)),
                "spectrum": np.geomspace(1, 1e-3, 128).tolist(),
            }
            for module in MODULES
        },
        phi=phi(),
        snapshots=[{"step": step, "stable_rank": ranks(), "phi": phi()} for step in (0, 10, 50)],
        data={"fingerprint": "0", "train_rows": 2384, "eval_rows": 596},
        environment=environment(),
    )


def cost_of_cells(recorded: int, measured: int) -> list[float]:
    """Fill the record to `recorded` cells, then run a study of `measured` more. Returns each cell's seconds."""
    fill(recorded)
    ends = []

    def run(config: object, **_: object) -> RunResult:
        ends.append(time.perf_counter())
        return result

    result, running.run = drawn_result(0), run
    seeds = ",".join(str(seed) for seed in range((recorded + measured) // ROWS))
    quiet(["cost.yaml", "--seeds", seeds])
    # From the moment that one cell's training ends to that when the next one's begins, which here are one.
    return [after - before for before, after in itertools.pairwise(ends)]


def fill(recorded: int) -> None:
    """Enter drawn results as the engine does, but without pictures."""
    study_of_cells = resolve(read_spec("cost.yaml"), seeds=list(range(recorded // ROWS)))
    record = Record("sqlite:///mlflow.db", "cost")
    known, parent = record.outcomes(), record.begin(study_of_cells.spec, {})
    for number, cell in enumerate(study_of_cells.cells):
        run_id = None if cell.key in known else record.start(parent, cell)
        if run_id is not None:
            record.finish(run_id, cell, drawn_result(number), {})


def quiet(arguments: list[str]) -> None:
    """Call the command line without its words."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        code = study(arguments)
    if code != 0:
        raise SystemExit(f"study {arguments} ended with {code}: {error.getvalue()}")


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", type=int, nargs=2, default=(10, 1000), help="cells in the record")
    parser.add_argument("--measured", type=int, default=20, help="cells run on top of them")
    options = parser.parse_args()
    versions = {name: environment()[name] for name in ("git_commit", "mlflow", "optuna", "torch")}
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}\n")
    medians = []
    for recorded in options.cells:
        seconds = cost_of_cells(recorded, options.measured)
        medians.append(statistics.median(seconds))
        print(f"{recorded} cells recorded: {medians[-1]:.3f} s a cell (median of {len(seconds)}, ", end="")
        print(f"{min(seconds):.3f} to {max(seconds):.3f})", flush=True)
    began = time.perf_counter()
    seeds = ",".join(str(seed) for seed in range(options.cells[1] // ROWS))
    quiet(["--report", "cost.yaml", "--seeds", seeds])
    report = time.perf_counter() - began
    growth = medians[1] / medians[0]
    print(f"growth: {growth:.2f} ×\nreport on {options.cells[1]} cells: {report:.1f} s")
    return int(max(medians) > AIM_SECONDS or growth > AIM_GROWTH or report > AIM_REPORT)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("cost.yaml").write_text(STUDY)
        sys.exit(main())
