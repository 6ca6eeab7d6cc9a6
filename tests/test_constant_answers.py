"""What a constant answer scores."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import pytest

from basisadapt.tasks.lookup import find
from basisadapt.tasks.settings import DataSettings

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "constant_answers.py"


@pytest.fixture
def answers(monkeypatch, capsys):
    """Runs the script; returns what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_the_most_frequent_answer(answers):
    labels = find("docstrings", DataSettings()).load(None).eval.head(100).labels
    answer, count = Counter(labels).most_common(1)[0]
    assert answers("docstrings", "--rows", "100").splitlines()[-1] == f"| docstrings | 100 | {answer} | {count}.0 |"


def test_every_task_of_a_suite(answers, data_dir):
    *_, mean = answers("commonsense/all", "--rows", "4000", "--data-dir", str(data_dir)).splitlines()
    assert mean == "| mean | 4,000 | | 38.35 |"


@pytest.mark.parametrize(
    ("task", "why"), [("glue/cola", "measured by matthews"), ("docstring", "did you mean 'docstrings'?")]
)
def test_refusals(answers, capsys, task, why):
    with pytest.raises(SystemExit, match="2"):
        answers(task)
    assert why in capsys.readouterr().err.splitlines()[-1]
