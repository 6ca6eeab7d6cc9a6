"""The program `python -m basisadapt.training`: runs the cells of a file, or as a worker those that it is told."""

from __future__ import annotations

import sys
from pathlib import Path

from basisadapt.core.command import DONE, HAS_FAILURES, INTERRUPTED, Parser, guarded, print_error
from basisadapt.core.errors import one_line
from basisadapt.core.registry import load_plugin
from basisadapt.training.execution.file import run_file
from basisadapt.training.execution.options import add_job_options, job_settings
from basisadapt.training.execution.worker import serve
from basisadapt.training.execution.workers import local_executor


@guarded
def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        settings = job_settings(options, options.adapters)
        if options.cells == "-":
            serve(settings)
        for plugin in settings.plugins:
            load_plugin(plugin)
        executor = local_executor(options.workers, settings)
        sound = run_file(Path(options.cells), options.output, executor, options.data_dir, options.brief)
        return DONE if sound else HAS_FAILURES
    except OSError as error:
        print_error(f"the results cannot be written: {one_line(error)}")
        return HAS_FAILURES
    except KeyboardInterrupt:
        print("\nInterrupted. Finished cells are kept; the same command resumes.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> Parser:
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
    add_job_options(parser)
    parser.add_argument(
        "--adapters", type=Path, metavar="DIR", help="leave every cell's adapter there, in a folder called by its key"
    )
    parser.add_argument(
        "--brief", action="store_true", help="write results without arrays (phi, spectra), which are far smaller"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
