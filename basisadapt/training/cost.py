"""The cost of training besides time: peak memory and tokens per second."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """Measures the training of a model: `with Cost(model) as cost: train()`.

    It counts the tokens of every forward pass in training mode, and tracks the peak of memory. Functions wrapped by
    `aside` do not count toward the peak; the caller subtracts their time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tokens: list[Tensor] = []  # one per forward, on its device: adding them up would wait for the device
        self._before = self._peak = math.nan

    def __enter__(self) -> Cost:
        self._hook = self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        _forget_garbage()
        self._before = self._peak = _reset()
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._look()

    def aside(self, function: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """`function`, wrapped so that the memory it uses does not count."""

        def call(step: int, total: int) -> None:
            self._look()
            function(step, total)
            _reset()

        return call

    def metrics(self, seconds: float) -> dict[str, float]:
        """The measurements; NaN if one is not available.

        - "memory.peak_bytes": on a GPU, the most bytes that torch had allocated, including the model; on a CPU, the
          growth of the process's resident memory since the start, which only Linux reports.
        - "tokens_per_second": the tokens without padding that training processed, divided by `seconds`.
        """
        tokens = sum(int(count) for count in self._tokens)
        return {
            "memory.peak_bytes": self._peak if torch.cuda.is_available() else self._peak - self._before,
            "tokens_per_second": tokens / seconds if tokens else math.nan,
        }

    def _count(self, model: nn.Module, _: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if not model.training:
            return
        if isinstance(inputs.get("attention_mask"), Tensor):
            self._tokens.append(inputs["attention_mask"].sum())
        elif isinstance(places := inputs.get("position_ids"), Tensor):
            # Packed rows, see `tasks.completion.packed`: padding is a position 0 that no position 1 follows.
            follows = functional.pad(places[:, 1:], (0, 1)) == 1
            self._tokens.append(((places > 0) | follows).sum())

    def _look(self) -> None:
        self._peak = max(self._peak, _peak())  # NaN stays NaN


def _forget_garbage() -> None:
    """Release memory that earlier runs of the process left: its reuse would not show as growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if CLEAR.exists() else None
    if trim is not None:  # glibc keeps freed memory
        trim(0)


def _reset() -> float:
    """Reset the peak. Returns the memory in use now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    try:
        CLEAR.write_text("5")  # the peak becomes the memory that is resident now
    except OSError:
        return math.nan
    return _peak()


def _peak() -> float:
    """The peak since the last reset, in bytes."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), math.nan)
