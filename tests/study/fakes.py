"""Runs that take no time and may be made to raise, diverge, stop, die or hang; also a driver program."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch

from basisadapt.core.errors import InputError
from basisadapt.tasks.asking import ask_all
from basisadapt.tasks.judge import Judge
from basisadapt.training import Plan, RunResult, planning, running
from basisadapt.training.execution import workers

MODULES = [f"encoder.layer.{depth}.{name}" for depth in range(2) for name in ("attention.self.query", "output.dense")]


class Hanging(Judge):
    """A judge that never answers."""

    def ask(self, messages):
        time.sleep(1)  # until Ctrl-C is listened to
        Path("asking").touch()
        time.sleep(600)


class Fakes:
    """`ways`: (basis or method, seed) -> how that run ends. `ran`: what was run, in order.

    `seconds`: how long a run takes. `score`: configuration -> accuracy; None draws one by basis, rank and seed. A score
    that raises is a failed run. `costs`: configuration -> further metrics, such as seconds.
    """

    def __init__(self, ways=None, seconds=0.0):
        self.ways = ways or {}
        self.seconds = seconds
        self.ran = []
        self.score = None
        self.costs = lambda config: {}

    def run(self, config, *, data_dir=None, on_step=None, save_to=None, accumulate=1, compiled=False):
        name = getattr(config.adapter, "basis", config.method)
        self.ran.append((name, config.seed))
        for step in range(1, 4):
            if self.seconds:
                time.sleep(self.seconds / 3)
            on_step(step, 3)
        way = self.ways.get((name, config.seed), "finish")
        if way == "interrupt":
            raise KeyboardInterrupt
        if way == "raise":
            raise RuntimeError("out of\nmemory")
        if way in ("SIGINT", "SIGTERM", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, way))
        if way == "SIGINT twice":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        if way == "SIGKILL once" and not Path("killed once").exists():
            Path("killed once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "big" and accumulate < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if way == "no score":
            self.score = lambda config: float("nan")
        if way == "judge hangs":
            ask_all(Hanging(), [[]])
        if way == "hang":
            Path("hanging").touch()
            time.sleep(600)
        draw = random.Random(f"{name} {config.adapter.r} {config.seed}")
        accuracy = self.score(config) if self.score else draw.uniform(0.6, 0.9)
        metrics = {
            "eval_loss": 1.0,
            "stable_rank.mean": 1.2,
            "dc_share.mean": 0.1,
            "parameters.trainable": 1234.0,
            **self.costs(config),
        }
        curve = {"z": [-0.1, 0.0, 0.1], "phi": [0.0, 1.0, 0.5]}
        return RunResult(
            status="diverged" if way == "diverge" else "finished",
            headline="accuracy",
            metrics=metrics if way == "diverge" else {**metrics, "accuracy": accuracy},
            curves={"loss": [(1, 2.0), (2, float("nan")), (3, 1.0)], "accuracy": [(1, 0.1), (2, 0.2)]},
            modules={module: {"stable_rank": 1.2, "dc_share": 0.1, "kind": "mlp"} for module in MODULES},
            phi={} if config.method == "lora" else dict.fromkeys(MODULES, curve),
            warnings=["collapsed: A and B did not move"] if name == "fourier" else [],
            environment={"git_commit": "abc123", "torch": "2"},
            accumulate=accumulate,
        )

    def plan(self, config, data_dir=None, dry=False):
        if config.adapter.r > 384:
            raise InputError("adapter.r must be at most 384")
        return Plan(modules=36, factors=1000 * config.adapter.r, transfer=100, head=10, total=10**6)

    def install(self):
        """For a whole process, which has one core: its cells run in it where nobody asks for workers."""
        running.run, planning.plan, workers.cores = self.run, self.plan, lambda: 1
