"""The benchmark of the host's time runs, on series and on tables, and fills its table."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from basisadapt.phi import choice, kernels, sums


def test_every_part_of_a_step_has_its_time(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    host_time = importlib.import_module("host_time")
    if host_time.DEVICE.type == "cuda":
        pytest.skip("the script times a GPU's kernels there")
    for module, name in ((kernels, "_fused"), (choice, "deferred"), (choice, "_send"), (choice, "largest")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the script has replaced it
    monkeypatch.setitem(sums.AT_ONCE, "cpu", sums.AT_ONCE["cpu"])
    monkeypatch.setattr(host_time, "TIMES", 1)
    monkeypatch.setattr("sys.argv", ["host_time.py", "--blocks", "1", "--rounds", "1", "--backend", "eager"])
    host_time.main()
    _, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = {name.strip(): [cell.strip() for cell in found] for _, name, *found, _ in (row.split("|") for row in rows)}
    assert cells.pop("evaluators") == ["", "Series", "Row"]
    assert len(cells) == 11
    for name, (lora, *ours) in cells.items():
        assert bool(lora) == name.startswith("step")
        assert all(float(number) > 0 for number in ours)
    assert float(cells["φ compiled, calls"][1]) < float(cells["φ compiled and chosen anew, calls"][1])
