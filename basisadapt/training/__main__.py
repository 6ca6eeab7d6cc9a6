"""The program `python -m basisadapt.training`: runs the cells of a file, or as a worker those that it is told."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from basisadapt.core.command import BAD_INPUT, DONE, INTERRUPTED, UNSOUND, Parser, complain, guarded
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
        )
        if options.cells == "-":
            serve(settings)
        for plugin in settings.plugins:
            load_plugin(plugin)
        executor = local_executor(options.workers, settings)
        sound = run_file(Path(options.cells), options.output, executor, options.data_dir, options.brief)
        return DONE if sound else UNSOUND
    except InputError as error:
        complain(error)
        return BAD_INPUT
    except OSError as error:
        complain(f"the results cannot be written: {one_line(error)}")
        return UNSOUND
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept; the same command goes on.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m basisadapt.training",
        description="Run the cells that `python -m basisadapt.study NAME --export cells.jsonl` has written, without "
        "Optuna and MLflow, and append their results to a file for `--import`. What is in the file already is not "
        "run again.",
        epilog="Exit codes: 0 done; 1 done, but a cell failed or diverged; 2 bad input; 130 interrupted.",
    )
    parser.add_argument("cells", metavar="CELLS", help="a file of --export; - is a worker, which is told its cells")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"), metavar="FILE", help="%(default)s")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE_OR_MODULE", help="as for a study")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the tasks' data lie")
    parser.add_argument("--workers", type=int, metavar="N", help="run so many cells at once, each in its own process")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="a cell that takes longer fails")
    parser.add_argument("--halve-batch", action="store_true", help="as for a study")
    parser.add_argument("--compile", action="store_true", help="as for a study")
    parser.add_argument("--brief", action="store_true", help="write results without arrays (phi, spectra): far smaller")
    return parser


if __name__ == "__main__":
    sys.exit(main())
