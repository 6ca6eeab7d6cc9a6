"""How many threads a cell should have: cells of the main job alone, beside a busy loop, and one for each core.

    python benchmarks/cell_threads.py [--cores 2] [--steps 10] [--rounds 3] [--backbone minilm]

On so many cores run cells with as many threads, with OpenMP's usual waiting and with passive waiting, and cells with
one thread; these ways take turns in every round, so that other work on the machine falls on all of them. Printed are
medians over the rounds: the seconds that a cell trains alone; how many times that beside a loop that keeps one of the
cores busy; and, where as many cells run at once as there are cores for their threads, how many are done in a minute.
`local_executor` takes the way with one thread; the aim is at most 2.2 times beside a busy loop, and the exit code is 1
where it is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field

from basisadapt.core.environment import environment

AIM = 2.2
CELL = """
import json, sys
from basisadapt import training
from basisadapt.training import RunConfig

config = RunConfig.from_mapping(json.loads(sys.argv[1]))
training.run(config)  # what a process does once
print("ready", flush=True)
sys.stdin.readline()
print(training.run(config).metrics["seconds.train"], flush=True)
"""


@dataclass
class Way:
    """Threads of a cell, and how they wait. What was measured, a value a round: seconds alone and beside a busy loop,
    and cells a minute."""

    threads: int
    passive: bool = False
    alone: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)

    @property
    def slowdown(self) -> float:
        """How many times as long a cell takes beside a busy loop; each round is compared with itself."""
        return statistics.median(busy / alone for alone, busy in zip(self.alone, self.busy, strict=True))

    def __str__(self) -> str:
        name = f"{self.threads} thread{'s' if self.threads > 1 else ''}{', passive' if self.passive else ''}"
        alone, rate = statistics.median(self.alone), statistics.median(self.rate)
        return f"{name}: {alone:.2f} s alone, {self.slowdown:.2f} times beside a busy loop, {rate:.1f} cells a minute"


def seconds(way: Way, config: str, cores: list[int], at_once: int = 1, busy: bool = False) -> float:
    """What a cell trains, the mean over those that run at once."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    threads = {"OMP_NUM_THREADS": str(way.threads), **({"OMP_WAIT_POLICY": "PASSIVE"} if way.passive else {})}
    start = functools.partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    on = functools.partial(os.sched_setaffinity, 0, cores)
    cell = [sys.executable, "-c", CELL, config]
    cells = [start(cell, env={**inherited, **threads}, preexec_fn=on) for _ in range(at_once)]
    for one in cells:
        assert one.stdout.readline() == "ready\n"
    on_first = functools.partial(os.sched_setaffinity, 0, cores[:1])
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=on_first)] if busy else []
    try:
        for one in cells:
            one.stdin.write("go\n")
            one.stdin.flush()
        return statistics.fmean(float(one.communicate()[0]) for one in cells)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cores", type=int, default=2, help="that cells may use")
    parser.add_argument("--steps", type=int, default=10, help="training steps of a cell")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    parser.add_argument("--backbone", default="minilm", help="as a study takes it")
    options = parser.parse_args()
    there = sorted(os.sched_getaffinity(0))
    if not 2 <= options.cores <= len(there):
        raise SystemExit(f"--cores must be from 2 to {len(there)}, the cores that there are, got {options.cores}")
    cores = there[: options.cores]
    config = json.dumps(
        {
            "task": "facts",
            "backbone": options.backbone,
            "adapter": {"preset": "residual", "r": 1, "num_basis": 16, "omega_init": "nyquist", "tolerance": 1e-5},
            "data": {"facts": 512},
            "train": {"lr": 3e-2, "batch_size": 512, "max_steps": options.steps},
            "seed": 1,
        }
    )
    print(f"{platform.platform()}, {len(cores)} cores, torch {environment()['torch']}, {environment()['git_commit']}\n")
    ways = [Way(len(cores)), Way(len(cores), passive=True), Way(1)]
    for _ in range(options.rounds):
        for way in ways:
            at_once = len(cores) // way.threads
            way.alone.append(seconds(way, config, cores))
            way.busy.append(seconds(way, config, cores, busy=True))
            way.rate.append(60 * at_once / (seconds(way, config, cores, at_once) if at_once > 1 else way.alone[-1]))
    for way in ways:
        print(way)
    return int(ways[-1].slowdown > AIM)


if __name__ == "__main__":
    sys.exit(main())
