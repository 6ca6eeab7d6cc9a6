"""What is said while cells run: how a row stands against its reference, and how long the rest takes."""

from __future__ import annotations

import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from test_loop import Book

from basisadapt.study.drive import loop, progress
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.training import RunResult
from basisadapt.training.execution.executor import Ended

# Seconds that a cell of the main job's rows trains on two cores.
ROWS = {"sinc": 16.2, "gaussian_rbf": 15.2, "fourier": 11.5, "LoRA": 4.4, "linear": 6.4, "sine": 8.0}


def shown(line):
    """A row, and its difference as the line of a cell that has ended tells it."""
    found = re.search(r"\] (\w+), seed .*, (\+\d.*|-\d.*) to LoRA over 3 seeds", line)
    return found and found.groups()


def test_a_finished_cell_tells_its_rows_difference_as_the_table_does(home, fake, study):
    code, out, err = study("tiny.yaml")
    assert code == 0, err
    last = dict(filter(None, map(shown, err.splitlines())))
    assert sorted(last) == ["fourier", "sinc"]
    for row, difference in last.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{row} "))
        assert difference in " ".join(line.split()), "mean and interval, in points"
    first, second = (next(line for line in err.splitlines() if f"sinc, seed {seed}:" in line) for seed in (1, 2))
    assert re.search(r" [+-]\d+\.\d\d to LoRA over 1 seed \(", first), "one pair has no interval"
    assert re.search(r" [+-]\d+\.\d\d \[.*\] to LoRA over 2 seeds \(", second)
    assert not any("to LoRA" in line for line in err.splitlines() if "] LoRA" in line)


def test_what_was_recorded_before_counts(home, fake, study):
    study("tiny.yaml", "--seeds", "1,2")
    _, _, err = study("tiny.yaml")
    assert [line.count("over 3 seeds") for line in err.splitlines() if "] sinc" in line] == [1]


def test_a_cell_that_failed_or_diverged_changes_no_difference(home, fake, study):
    fake.ways = {("sinc", 2): "raise", ("sinc", 3): "diverge", ("lora", 1): "raise"}
    _, _, err = study("tiny.yaml")
    assert [line for line in err.splitlines() if "] sinc" in line and "to LoRA" in line] == []
    assert [line.count("over 2 seeds") for line in err.splitlines() if "] fourier, seed 3" in line] == [1]


def test_cells_take_turns_seed_by_seed_the_reference_first(folder):
    study = resolve(read_spec("tiny.yaml"))
    names = [(cell.row, cell.seed) for cell in study.in_turn]
    assert names == [(row, seed) for seed in (1, 2, 3) for row in ("LoRA", "sinc", "fourier")]
    assert sorted(cell.key for cell in study.cells) == sorted(cell.key for cell in study.in_turn)
    tasks = resolve(read_spec("tiny.yaml"), changes=["sweep.task=docstrings,vision/digits"]).in_turn
    assert [cell.config.task for cell in tasks] == ["docstrings"] * 9 + ["vision/digits"] * 9, "one task after another"


class Clock:
    """Processes that start in `starting` seconds, load for `loading`, then do their cells; `wait` sets the clock."""

    def __init__(self, slots, seconds, starting, loading):
        self.now, self.slots, self._seconds = 0.0, slots, seconds
        self._starting, self._loading, self._begins, self._free, self._running = starting, loading, {}, [], {}

    def submit(self, job):
        idle = self._free.pop() if self._free else None
        began = self.now if idle else self.now + self._starting
        self._begins[job.key] = began
        self._running[job.key] = began + self._seconds[job.key] + (0.0 if idle else self._loading)

    def wait(self, on_step):
        key = min(self._running, key=self._running.get)
        end = self._running.pop(key)
        for begun in [one for one, at in sorted(self._begins.items(), key=lambda item: item[1]) if at <= end]:
            self.now = max(self.now, self._begins.pop(begun))
            on_step(begun, 0, 0)
        self.now = end
        self._free.append("idle")
        metrics = {"seconds.train": 0.9 * self._seconds[key], "seconds.eval": 0.1 * self._seconds[key]}
        return Ended(key, RunResult("finished", "bits", metrics))


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_the_time_left_is_right_within_a_third_after_three_cells(folder, monkeypatch, slots):
    rows = "title: T\nquestion: Q\nbase: {task: docstrings, backbone: minilm, method: phi}\nbeside:\n"
    rows += "".join(f"  - {{label: {name}, set: {{r: {r}}}}}\n" for r, name in enumerate(ROWS, 1))
    (folder / "rows.yaml").write_text(rows + "reference: LoRA\nseeds: [1, 2, 3, 4, 5, 6, 7, 8]\n")
    cells = resolve(read_spec("rows.yaml")).in_turn
    draw = random.Random(slots)
    clock = Clock(
        slots, {cell.key: ROWS[cell.row] * draw.uniform(0.9, 1.1) for cell in cells}, starting=8.0, loading=7.0
    )
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    told = []
    monkeypatch.setattr(progress.Progress, "_say", lambda self, text: told.append((clock.now, text)))
    interrupt = SimpleNamespace(asked=False, held=nullcontext)
    standing = SimpleNamespace(after=lambda *_: "")
    with progress.Progress(cells, 0, slots, standing) as shown:
        loop.Loop(cells, Book(), clock, interrupt, shown).run()
    assert len(told) == 48
    assert [("left" in text) for _, text in told] == [False] * 2 + [True] * 45 + [False]
    for at, text in told[2:40]:
        number, unit = re.search(r"about (\d+) (s|min) left$", text).groups()
        left = int(number) * (60 if unit == "min" else 1)
        assert left == pytest.approx(clock.now - at, rel=0.3, abs=30 if unit == "min" else 1), text
