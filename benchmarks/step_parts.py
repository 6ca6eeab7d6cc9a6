"""The parts of a training step on the host: forward, with the compilation of φ in it, backward, the optimizer.

    python benchmarks/step_parts.py qwen2-0.5b --rank 16 --batch 16x128 --compile no regional reduced

The options, models and methods are those of `train_step.py`; --rounds counts steps, whose medians are printed. A part
is the time until the host has launched it; the GPU's own time, that of its kernels, is measured in one more step, and
where the step takes longer than all parts together, the host waited for it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import wraps
from itertools import pairwise, product
from typing import Any

import torch
import train_step
from train_step import Case, Step

from basisadapt.core.environment import environment
from basisadapt.phi.compiler import Compiler

COLUMNS = ["step", "forward", "of it, compiling φ", "backward", "optimizer"]
UNTIMED = 6


def clocked(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which adds its time to the last of `seconds`."""

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[-1] += time.perf_counter() - start

    return timed


def parts(step: Step, device: torch.device, count: int) -> dict[str, list[float]]:
    """Seconds of every column, of `count` steps."""
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    original = Compiler._compile
    Compiler._compile = clocked(original, found["of it, compiling φ"])  # type: ignore[method-assign]
    try:
        for _ in range(UNTIMED + count):
            found["of it, compiling φ"].append(0.0)
            wait(device)
            times = [time.perf_counter()]
            with step.autocast:
                loss = step.call(**step.inputs).loss
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            step.optimizer.step()
            step.optimizer.zero_grad()
            times.append(time.perf_counter())
            wait(device)
            found["step"].append(time.perf_counter() - times[0])
            for name, (before, after) in zip(("forward", "backward", "optimizer"), pairwise(times), strict=True):
                found[name].append(after - before)
    finally:
        Compiler._compile = original  # type: ignore[method-assign]
    return {name: seconds[UNTIMED:] for name, seconds in found.items()}


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(case: Case, given: Any) -> None:
    """Measure and print the rows of one case."""
    base = case.base()
    case.prepare(base)
    names = [name for name in train_step.rivals(case) if any(m in name for m in ["LoRA (peft)", *given.methods])]
    print(f"\n{case}\n\n| method | compile | {', ms | '.join(COLUMNS)}, ms | GPU at work, ms | kernels |")
    print("|---|---|" + "---:|" * (len(COLUMNS) + 2))
    for name, way in product(names, given.compile):
        with train_step.attached(case, base, train_step.rivals(case)[name], way) as step:
            found = parts(step, case.device, given.rounds)
            busy = train_step.busy(step) if case.device.type == "cuda" else None
        row = [f"{statistics.median(found[column]) * 1e3:.1f}" for column in COLUMNS]
        row += [f"{busy[0] * 1e3:.1f}", f"{busy[1]:,}"] if busy else ["", ""]
        print(f"| {name} | {way} | {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print a table for every case."""
    given = train_step.parse(sys.argv[1:])
    given.methods = given.methods.split(";")
    for name, value in environment().items():
        print(f"{name}: {value}")
    for case in train_step.axes(given):
        report(case, given)


if __name__ == "__main__":
    main()
