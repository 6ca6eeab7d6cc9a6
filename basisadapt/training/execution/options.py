"""The options of a command line that runs cells, and the settings that they give."""

from __future__ import annotations

import argparse
from pathlib import Path

from basisadapt.core.command import Parser
from basisadapt.training.execution.executor import JobSettings


def add_job_options(parser: Parser) -> None:
    """Add the options of `job_settings`, and --workers."""
    parser.add_plugins(
        "a Python file or module that defines bases, grids, sharing policies, placements, tasks, backbones, methods or "
        "diagnostics; CONTRIBUTING.md has a recipe for each"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the tasks' data")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="run N cells at once, each in its own process (default: on a CPU, as many as cores and memory allow, each "
        "with one thread; on a GPU, one, in this process)",
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="fail a cell that takes longer; the others continue"
    )
    parser.add_argument(
        "--halve-batch",
        action="store_true",
        help="repeat a cell that runs out of memory with half the batch and twice the gradient accumulation",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="train with blocks that torch.compile has fused: minutes for the first cell, then faster on a GPU; its "
        "numbers differ by rounding",
    )


def job_settings(options: argparse.Namespace, adapters: Path | None) -> JobSettings:
    """The settings of jobs from the parsed options. adapters: see `JobSettings`. Raises InputError out of range."""
    return JobSettings(
        data_dir=options.data_dir,
        plugins=tuple(options.plugin),
        halve_batch=options.halve_batch,
        timeout=options.timeout,
        compile=options.compile,
        adapters=adapters,
    )
