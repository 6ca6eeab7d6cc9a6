"""The options of `python -m basisadapt.study`, and which of them go together."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from basisadapt import __version__
from basisadapt.core.command import Parser
from basisadapt.core.errors import InputError, shown
from basisadapt.study.plan.changes import setting_meant
from basisadapt.study.plan.shipped import list_studies
from basisadapt.study.plan.spec import PRESETS
from basisadapt.training.execution.options import add_job_options

SAMPLERS = ("tpe", "random")
EXAMPLES = """\
Examples:
  python -m basisadapt.study ablate_basis
  python -m basisadapt.study ablate_basis --dry-run --set backbone=qwen2-0.5b --set adapter.r=16
  python -m basisadapt.study compare_methods --preset smoke --workers 2 --output results
  python -m basisadapt.study ablate_basis --plugin my_bases.py --set sweep.basis=sinc,morlet
  python -m basisadapt.study ablate_basis --search tpe --trials 30
  python -m basisadapt.study --report ablate_basis --json

Exit codes: 0 done; 1 a cell failed or diverged, or the record could not be written; 2 bad input; 130 interrupted (the
same command resumes)."""


def make_parser() -> Parser:
    """The options in the order of --help, group by group."""
    parser = Parser(
        prog="python -m basisadapt.study",
        description="Run the cells that a study has not recorded yet. Then print its table beside the published one,\n"
        "and a verdict on each of the paper's claims.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        setting=setting_meant,
    )
    _add_actions(parser)
    _add_settings(parser)
    _add_search(parser)
    _add_stores(parser)
    add_job_options(parser)
    _add_ray(parser)
    _add_exchange(parser)
    _add_adapters(parser)
    parser.add_argument(
        "--ui", action="store_true", help="serve MLflow's UI for the record at 127.0.0.1 until Ctrl-C; needs no NAME"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    parser.add_argument("--version", action="version", version=f"basisadapt {__version__}")
    return parser


def _add_actions(parser: Parser) -> None:
    name = parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a study that --list shows, or the path of a YAML file"
    )
    name.completer = lambda **_: list_studies()  # type: ignore[attr-defined]  # argcomplete's
    parser.add_argument("--list", action="store_true", help="list the studies")
    parser.add_argument(
        "--report",
        metavar="NAME",
        help="print a study's report from the record (with --search, the search's); runs nothing",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells and their parameter counts; runs nothing"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document on stdout, and nothing else: after a run, or with --list, --dry-run or --report",
    )


def _add_settings(parser: Parser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as adapter.r=8 or train.lr=1e-3; an axis, such as sweep.basis=sinc,fourier; or "
        "the values that are tuned, such as tune.train.lr=1e-3,1e-2",
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="the size of the runs (default: quick)")
    parser.add_argument("--seeds", metavar="N,N,...", help="seeds to use instead of the study's")


def _add_search(parser: Parser) -> None:
    parser.add_argument(
        "--search",
        choices=SAMPLERS,
        help="search instead of running the grid: over the ranges in the study's `search`, or else over its axes and "
        "every setting with a declared range. Each trial runs on every task with every seed, and its value is the "
        "mean. The first seed drives the sampler",
    )
    parser.add_argument("--trials", type=int, metavar="T", help="number of trials, finished ones included")
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="K",
        help="propose K trials together (default: 1), so that their cells can run at once; the sampler sees their "
        "values when all K have ended",
    )


def _add_stores(parser: Parser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="also write the report to this folder: one HTML page, Markdown, CSV, figures",
    )
    parser.add_argument(
        "--tracking-uri",
        default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db",
        metavar="URI",
        help="MLflow's store (default: MLFLOW_TRACKING_URI if it is set, else sqlite:///mlflow.db)",
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna's store (default: optuna.db beside MLflow's file)")


def _add_ray(parser: Parser) -> None:
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the cells as tasks of the Ray cluster at ADDRESS, or with `--ray local` on this machine",
    )
    parser.add_argument(
        "--cpus-per-cell", type=float, metavar="C", help="CPUs that a cell takes on a Ray cluster (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-cell", type=float, metavar="G", help="GPUs likewise (default: 0); 0.25 lets four cells share one"
    )


def _add_exchange(parser: Parser) -> None:
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the cells that the record lacks, to be run by `python -m basisadapt.training FILE` elsewhere",
    )
    parser.add_argument(
        "--import",
        dest="results",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="enter the results of exported cells into the record, and report; runs nothing. Results of other studies "
        "also count for cells of the same configuration",
    )


def _add_adapters(parser: Parser) -> None:
    parser.add_argument(
        "--save-adapters",
        action="store_true",
        help="keep each cell's adapter with its run in MLflow, and the names of the plug-ins that it needs",
    )
    parser.add_argument(
        "--merge",
        metavar="RUN",
        help="merge the adapter of a run, by its id in MLflow or its folder, into its backbone and write the model, "
        "which transformers loads without this package, to --output DIR; needs no NAME",
    )


def check_together(options: argparse.Namespace) -> None:
    """Raise InputError for options that are incomplete or do not go together."""
    if options.merge is not None:
        if options.name is not None or options.report is not None or options.output is None:
            raise InputError("--merge RUN goes with --output DIR, and with no NAME")
        return
    if not options.list and not options.ui and (options.name is None) == (options.report is None):
        raise InputError("give the NAME of a study or --report NAME (--list lists the studies)")
    if (options.search is None) != (options.trials is None):
        raise InputError("--search and --trials go together, such as --search tpe --trials 30")
    if options.search is None and options.at_once is not None:
        raise InputError("--at-once goes with --search")
    if options.ray is None and (options.cpus_per_cell is not None or options.gpus_per_cell is not None):
        raise InputError("--cpus-per-cell and --gpus-per-cell go with --ray")
    if options.ray is not None and options.workers is not None:
        raise InputError("--workers does not go with --ray, whose cluster says how many cells run at once")
    if options.save_adapters and options.ray is not None:
        raise InputError("--save-adapters does not go with --ray, whose nodes have no folder in common")
    if options.json and options.ui:
        raise InputError("--json does not go with --ui, which serves pages")
    apart = {"--export": options.export, "--import": options.results}
    others = {"--report": options.report, "--dry-run": options.dry_run, "--search": options.search, **apart}
    given = [option for option, value in others.items() if value]
    if len(given) > 1 and given[-1] in apart:
        raise InputError(f"{given[-1]} does not go with {given[0]}")
    quiet = [option for option in given if option != "--search"]
    if options.save_adapters and quiet:
        raise InputError(f"--save-adapters does not go with {quiet[0]}, which runs nothing")


def seeds_of(text: str | None) -> list[int] | None:
    """The seeds of --seeds; None without the option. Raises InputError."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds needs whole numbers, such as 42,123,456, got {shown(text)}") from error
