"""Judge saved answers to MT-Bench again: `python -m basisadapt.mt_bench FILE --data-dir DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from basisadapt.core.command import DONE, INTERRUPTED, Parser, guarded


@guarded
def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        _judge(options.answers, options.data_dir)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished judgments are kept; the same command resumes.", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _parser() -> Parser:
    parser = Parser(
        prog="python -m basisadapt.mt_bench",
        description="Judge saved answers to MT-Bench with the model that BASISADAPT_JUDGE_URL, _MODEL and _KEY name, "
        "and print the scores. Judgments that BASISADAPT_JUDGE_DIR holds are not requested again.",
    )
    parser.add_argument(
        "answers",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="answers that a run saved, or other answers in FastChat's format",
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="folder whose instruct/ has MT-Bench's files"
    )
    return parser


def _judge(files: Sequence[Path], data_dir: Path) -> None:
    from basisadapt.tasks.judge import configured_judge
    from basisadapt.tasks.mt_bench import judged, read_answers, read_bench

    judge, bench = configured_judge(), read_bench(data_dir)
    read = {path: read_answers(path, bench) for path in files}
    for path, (rows, answers) in read.items():
        print(f"{path}: {len(rows)} questions, judged by {judge.name}")
        for name, value in judged(rows, answers, judge).items():
            print(f"  {name:<17}{value:>8.4g}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
