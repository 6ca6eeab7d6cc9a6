"""Drivers killed at random moments of everything that they do: nothing is lost, doubled, left open or beyond repair.

BASISADAPT_KILLS says how many, BASISADAPT_FIRST_KILL from which on: ten processes with 10 kills each, the first 0, 10,
.. 90, make those of one with 100. Workers and servers are killed in `test_ray.py` and `test_cluster.py`.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import conftest
import pytest
from forked import Forked
from test_bad_content import results_of

KILLS = int(os.environ.get("BASISADAPT_KILLS", "100"))
FIRST = int(os.environ.get("BASISADAPT_FIRST_KILL", "0"))
TUNE = "tune: {grid: {train.lr: [1e-3, 1e-2]}, seeds: [7], validation: 0.2}\n"
SEEDS = ("--seeds", "1,2")
COMMANDS = {
    "run": ("tiny.yaml", *SEEDS),
    "workers": ("tiny.yaml", *SEEDS, "--workers", "2", "--plugin", "faking.py"),
    "import": ("tiny.yaml", *SEEDS, "--import", "results.jsonl"),
    "report": ("--report", "tiny.yaml", *SEEDS, "--output", "report"),
    "search": ("tiny.yaml", "--seeds", "1", "--search", "random", "--trials", "3"),
    "tuning": ("tuned.yaml", "--seeds", "1"),
}
SIGNALS = {"KILL": [9], "TERM": [15], "INT": [2], "INT twice": [2, 2]}


# A driver whose runs take next to no time, and that draws: that is some of what it may be killed at.
DRIVER = """
import sys
import fakes, quick
from basisadapt.study.__main__ import main

fakes.Fakes(seconds=0.05).install()
quick.put(quick.DRAWN)
sys.exit(main(sys.argv[1:]))
"""


def start(folder, command):
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return Forked([sys.executable, "-c", DRIVER, *COMMANDS[command]], cwd=folder, stdout=out, stderr=err)


def call(folder, command):
    """A whole call: exit code, the table, and how long it took once it was there."""
    driver, began = start(folder, command), time.monotonic()
    code = driver.wait()
    return code, (folder / "out").read_text().split("\nRecorded in")[0], time.monotonic() - began


@pytest.fixture
def plugin(folder):
    """What makes runs take next to no time in workers too."""
    text = f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    (folder / "faking.py").write_text(text + "import fakes\n\nfakes.Fakes(seconds=0.5).install()\n")


def open_and_doubled(folder):
    """What is RUNNING in both stores, and the cells that are finished more than once."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as mlflow, closing(sqlite3.connect(folder / "optuna.db")) as o:
        (runs,) = mlflow.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()
        (trials,) = o.execute("SELECT count(*) FROM trials WHERE state = 'RUNNING'").fetchone()
        finished = mlflow.execute(
            "SELECT value FROM tags JOIN runs USING (run_uuid) WHERE key = 'basisadapt.cell' AND status = 'FINISHED' "
            "AND lifecycle_stage = 'active'"
        )
        cells = collections.Counter(key for (key,) in finished)
    return runs, trials, sum(count > 1 for count in cells.values())


@pytest.mark.slow
@pytest.mark.timeout(60 * KILLS + 600)
def test_whatever_a_driver_is_at_when_it_is_killed(folder, plugin, fake, study, tmp_path_factory):
    (folder / "tuned.yaml").write_text(conftest.STUDY.replace("[sinc, fourier]", "[sinc]") + TUNE)
    (folder / "tiny.yaml").write_text(conftest.STUDY + "search: {adapter.r: [2, 64]}\n")
    results_of(fake, study, COMMANDS["run"])
    fresh, existing, trial = (tmp_path_factory.mktemp(name) for name in ("fresh", "existing", "trial"))
    shutil.copytree(folder, fresh, dirs_exist_ok=True)
    shutil.copytree(fresh, existing, dirs_exist_ok=True)
    COMMANDS["before"] = ("tiny.yaml", "--seeds", "1")
    assert call(existing, "before")[0] == 0
    # What each call says undisturbed, and how long it takes.
    states = {"fresh": fresh, "existing": existing}
    kinds = [(state, command) for command in COMMANDS for state in states if command != "before"]
    kinds.remove(("fresh", "report"))
    expected = {}

    def begin(state):
        shutil.rmtree(trial)
        shutil.copytree(states[state], trial)

    for state, command in kinds:
        begin(state)
        expected[state, command] = call(trial, command)
        assert expected[state, command][0] in (0, 1), (trial / "err").read_text()

    tally = collections.Counter()
    for n in range(FIRST, FIRST + KILLS):
        draw = random.Random(n)
        state, command = kinds[n % len(kinds)]
        name = draw.choice(list(SIGNALS))
        code, table, seconds = expected[state, command]
        begin(state)
        driver = start(trial, command)
        time.sleep(draw.uniform(0.0, seconds))
        for number in SIGNALS[name]:
            driver.send_signal(number)
            time.sleep(0.02)
        tally[f"ended with {driver.wait()}"] += 1
        again, found, _ = call(trial, command)
        said = f"kill {n}: {name} in {state} {command}: {(trial / 'err').read_text()}"
        assert again == code, said
        assert found == table, said
        if command != "report":
            assert open_and_doubled(trial) == (0, 0, 0), said
        assert not list(trial.glob("*.new*")), said
        tally.update([name, state, command])
    print(f"{KILLS} kills, after each the table as without it, nothing open, doubled or left: {dict(tally)}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_kills_of_a_driver_with_workers_leave_the_table_as_it_is(folder, plugin, tmp_path_factory):
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(folder, undisturbed, dirs_exist_ok=True)
    code, expected, seconds = call(undisturbed, "workers")
    assert code == 0, (undisturbed / "err").read_text()
    draw, ended = random.Random(0), []
    for moment in sorted(draw.uniform(0.3, 0.95) for _ in range(5)):  # the earliest first, which leave work to do
        driver = start(folder, "workers")
        time.sleep(moment * seconds)
        driver.kill()
        ended.append(driver.wait())
    code, found, _ = call(folder, "workers")
    assert (code, found) == (0, expected), (folder / "err").read_text()
    assert open_and_doubled(folder) == (0, 0, 0)
    with closing(sqlite3.connect(folder / "mlflow.db")) as mlflow:
        (killed,) = mlflow.execute("SELECT count(*) FROM runs WHERE status = 'KILLED'").fetchone()
    assert -9 in ended
    print(f"drivers ended with {ended}; {killed} runs were closed; the table as without")
