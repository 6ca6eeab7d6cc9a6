"""The benchmark of bandwidths and gains runs, and names the evaluator and its error beside each time."""

from __future__ import annotations

import importlib
import re
from pathlib import Path


def test_every_time_has_its_evaluator_and_error(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    cliff = importlib.import_module("cliff")
    monkeypatch.setattr(cliff, "BASES", ("sinc",))
    monkeypatch.setattr(cliff, "ROUNDS", 1)
    monkeypatch.setattr(cliff, "PATIENCE", 0.0)
    monkeypatch.setattr("sys.argv", ["cliff.py", "--functions", "8", "--gains", "1", "--omega", "1.0"])
    cliff.main()
    time, kind, error = re.search(r"\| 8, 1\.0 \| sinc \| (\S+) \((\w+), (\S+)\) \|", capsys.readouterr().out).groups()
    assert float(time) > 0
    assert kind[0] in "ST"
    assert float(error) < 1e-3
