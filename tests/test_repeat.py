"""Cells drawn from the recorded results and held against a second run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from basisadapt.execution.lines import CellLine, read_lines
from basisadapt.run_config import RunConfig

ROOT = Path(__file__).parents[1]


def repeat(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "repeat.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


def test_what_is_drawn_can_be_run(tmp_path):
    drawn = [repeat("draw", "--cells", "3", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    (tmp_path / "again.jsonl").write_text(drawn[0])
    lines = read_lines(tmp_path / "again.jsonl", CellLine, "CELLS")
    assert len({line.key for line in lines}) == 3
    assert [RunConfig.from_mapping(line.config).seed for line in lines] == [line.config["seed"] for line in lines]


def test_the_second_run_on_record_has_the_scores_of_the_first():
    *table, _, last = repeat("compare", str(ROOT / "studies" / "results" / "again.jsonl.gz")).splitlines()
    assert last == "19 of 20 scores are the same to four digits; run again at cbd0578."
    assert len(table) == 2 + 20
    (other,) = [cells for cells in (row.split(" | ") for row in table[2:]) if cells[3] != cells[4]]
    assert other[1] == "paper recipe, glue/stsb"
