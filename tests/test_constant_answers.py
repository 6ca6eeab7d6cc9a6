"""What a constant answer scores."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from basisadapt.tasks.lookup import find
from basisadapt.tasks.settings import DataSettings

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "constant_answers.py"


def answers(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=100)


def test_the_most_frequent_answer():
    labels = find("docstrings", DataSettings()).load(None).eval.head(100).labels
    answer, count = Counter(labels).most_common(1)[0]
    assert (
        answers("docstrings", "--rows", "100").stdout.splitlines()[-1] == f"| docstrings | 100 | {answer} | {count}.0 |"
    )


def test_every_task_of_a_suite(data_dir):
    *_, mean = answers("commonsense/all", "--rows", "4000", "--data-dir", str(data_dir)).stdout.splitlines()
    assert mean == "| mean | 4,000 | | 38.35 |"


def test_refusals():
    for task, why in (("glue/cola", "measured by matthews"), ("docstring", "did you mean 'docstrings'?")):
        refused = answers(task)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert why in refused.stderr.splitlines()[-1]
