"""The benchmark of many cells at once, on results that are written here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from basisadapt.training.config import RunConfig
from basisadapt.training.execution.json_lines import ResultLine

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cells_at_once.py"


def line(number, method, rate, began, ended, status="finished"):
    config = RunConfig.from_mapping({"method": method}).to_mapping()
    metrics = {"tokens_per_second": rate, "seconds.train": 10.0}
    result = {"status": status, "headline": "accuracy", "metrics": metrics, "environment": {"device": "a card"}}
    return ResultLine(
        study="s", row="r", key=f"{number:016d}", config=config, host="h", began=began, ended=ended, result=result
    )


def measured(tmp_path, *lines):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in lines))
    return subprocess.run([sys.executable, SCRIPT, path, "--gpus", "2"], capture_output=True, text=True, timeout=100)


def test_tokens_of_all_cells_are_counted_over_the_stretch_and_the_cards(tmp_path):
    done = measured(
        tmp_path, line(1, "lora", 100.0, 0.0, 20.0), line(2, "lora", 300.0, 0.0, 40.0), line(3, "phi", 50.0, 20.0, 40.0)
    )
    assert done.returncode == 0, done.stderr
    assert "3 cells in 40 s on 2 cards, 1.0 at once on a card" in done.stdout
    assert f"all of the stretch: {(1000 + 3000 + 500) / 40 / 2:,.0f} tokens/s a card" in done.stdout
    lora = next(row for row in done.stdout.splitlines() if row.startswith("lora"))
    assert lora.split()[-3:] == ["2", "200", "200"]


@pytest.mark.parametrize("status", ["diverged"])
def test_cells_that_did_not_finish_have_no_speed(tmp_path, status):
    done = measured(tmp_path, line(1, "lora", 100.0, 0.0, 20.0, status))
    assert done.returncode == 1
    assert "no speed of cells that did not finish" in done.stdout
