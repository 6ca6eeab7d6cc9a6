"""What training costs beside time: memory at its peak, and how many tokens a second it gets through."""

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
    """Measures a model's training: `with Cost(model) as cost: train()`.

    It counts the tokens of every forward in training, and follows the peak of the memory. What runs `aside` is left out
    of the peak; its time is for the caller to leave out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tokens: list[Tensor] = []  # of a forward each, where they are: a sum would wait for the device
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
        """`function`, whose memory does not count."""

        def call(step: int, total: int) -> None:
            self._look()
            function(step, total)
            _reset()

        return call

    def metrics(self, seconds: float) -> dict[str, float]:
        """What was measured; NaN for what cannot be.

        "memory.peak_bytes": on a GPU the most that torch had allocated, model included; on a CPU the growth of the
        process' resident memory over what it was before, which Linux alone tells. "tokens_per_second": tokens without
        padding that training processed, by the attention mask, over `seconds`.
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
            # Packed rows, see `tasks.completion.packed`: padding is a beginning that nothing follows.
            follows = functional.pad(places[:, 1:], (0, 1)) == 1
            self._tokens.append(((places > 0) | follows).sum())

    def _look(self) -> None:
        self._peak = max(self._peak, _peak())  # NaN stays NaN


def _forget_garbage() -> None:
    """Give back what earlier runs of the process left, whose reuse would go unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if CLEAR.exists() else None
    if trim is not None:  # glibc keeps what is freed
        trim(0)


def _reset() -> float:
    """Begin a new peak. Returns the memory in use now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    try:
        CLEAR.write_text("5")  # the peak becomes what is resident now
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
