"""What a constant answer scores: for each task the answer that is right most often among the rows tested on.

    python benchmarks/constant_answers.py commonsense/all --rows 4000 --data-dir DATA

The constant is the best one for these very rows, so that no model without knowledge of the questions scores more but by
luck. Of a suite the last line is the mean over its tasks, as its accuracy is. Nothing is trained.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from pathlib import Path

from basisadapt.core.errors import InputError
from basisadapt.tasks.lookup import find
from basisadapt.tasks.settings import DataSettings


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="one whose answers are classes or options")
    parser.add_argument("--rows", type=int, help="as train.eval_rows: only the first so many")
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    try:
        task = find(given.task, DataSettings())
        if task.headline != "accuracy":
            parser.error(f"{given.task} is measured by {task.headline}, not by accuracy")
        rows = task.load(given.data_dir).eval.head(given.rows)
    except InputError as problem:
        parser.error(str(problem))
    answers: dict[str, list[str]] = {}
    for row, label in zip(rows.inputs, rows.labels, strict=True):
        answers.setdefault(getattr(row, "group", given.task), []).append(str(label))
    print("| task | rows | most frequent answer | right, % |\n|---|---:|---|---:|")
    shares = []
    for name, labels in answers.items():
        ((answer, count),) = Counter(labels).most_common(1)
        shares.append(100 * count / len(labels))
        print(f"| {name} | {len(labels):,} | {answer} | {shares[-1]:.1f} |")
    if len(shares) > 1:
        print(f"| mean | {len(rows):,} | | {statistics.mean(shares):.2f} |")


if __name__ == "__main__":
    main()
