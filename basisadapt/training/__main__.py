"""The program `python -m basisadapt.training`: runs the cells of a file, or as a worker those that it is told."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from basisadapt.core.command import BAD_INPUT, DONE, HAS_FAILURES, INTERRUPTED, Parser, guarded, print_error
from basisadapt.core.errors import InputError, one_line
from basisadapt.core.registry import load_plugin
from basisadapt.training.execution.executor import JobSettings
from basisadapt.training.execution.file import run_file
from basisadapt.training.execution.worker import serve
from basisadapt.training.execution.workers import local_executor


@guarded
def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        settings = JobSettings(
            data_dir=options.data_dir,
            plugins=tuple(options.plugin),
            halve_batch=options.halve_batch,
            timeout=options.timeout,
            compile=options.compile,
            adapters=options.adapters,
        )
        if options.cells == "-":
            serve(settings)
        for plugin in settings.plugins:
            load_plugin(plugin)
        executor = local_executor(options.workers, settings)
        sound = run_file(Path(options.cells), options.output, executor, options.data_dir, options.brief)
        return DONE if sound else HAS_FAILURES
    except InputError as error:
        print_error(error)
        return BAD_INPUT
    except OSError as error:
        print_error(f"the results cannot be written: {one_line(error)}")
        return HAS_FAILURES
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept; the same command goes on.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m basisadapt.training",
        description="Run the cells that `python -m basisadapt.study NAME --export cells.jsonl` wrote, without Optuna "
        "and MLflow, and append their results to a file for `--import`. Cells with results in the file are not run "
        "again.",
        epilog="Exit codes: 0 done; 1 a cell failed or diverged, or the results could not be written; 2 bad input; "
        "130 interrupted (the same command resumes).",
    )
    parser.add_argument(
        "cells", metavar="CELLS", help="a file that --export wrote; - makes a worker, which reads cells from stdin"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results.jsonl"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE_OR_MODULE", help="as for a study")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the tasks' data")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="run N cells at once, each in its own process (default: on a CPU, as many as cores and memory allow, each "
        "with one thread; on a GPU, one, in this process)",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="fail a cell that takes longer")
    parser.add_argument("--halve-batch", action="store_true", help="as for a study")
    parser.add_argument("--compile", action="store_true", help="as for a study")
    parser.add_argument(
        "--adapters", type=Path, metavar="DIR", help="leave every cell's adapter there, in a folder called by its key"
    )
    parser.add_argument(
        "--brief", action="store_true", help="write results without arrays (phi, spectra), which are far smaller"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
