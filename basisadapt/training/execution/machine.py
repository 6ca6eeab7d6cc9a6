"""The resources that this process may use: cores, memory, accelerators."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's limits under Linux


def cores() -> int:
    """The number of cores; in a container at most its quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no Linux, or no quota: "max 100000"
        quota, period = map(int, (CONTROL_GROUP / "cpu.max").read_text().split())
        found = min(found, quota // period)
    return max(1, found)


def free_memory() -> int:
    """The free memory in bytes; in a container at most its limit."""
    import psutil

    found = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no Linux, or no limit: "max"
        found = min(found, int((CONTROL_GROUP / "memory.max").read_text()))
    return found


def accelerated() -> bool:
    """Whether torch has an accelerator."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def gpus() -> list[str]:
    """The names of the GPUs, as in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return named.split(",")[:count]
