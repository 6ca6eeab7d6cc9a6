"""A run whose blocks torch.compile has fused: far fewer kernels a step, which is what bounds a small model on a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from basisadapt.core.errors import InputError

KEPT = 64  # graphs of earlier models, for the next one of the same kind
MAX_GRAPHS = 64  # graphs of one model: first block or later one, training or evaluation, one row or several


def check_compiler() -> None:
    """Raise InputError where torch.compile has nothing to compile with: triton for a GPU, a C++ compiler for a CPU."""
    from torch.utils import _triton

    if torch.cuda.is_available():
        if not _triton.has_triton():
            raise InputError("--compile needs triton, which is not installed or does not know this GPU")
    elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise InputError("--compile needs a C++ compiler on a machine without a GPU, and finds none")


@contextmanager
def compiled_blocks(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While it lasts, every block of a transformers model runs compiled, if that is `wanted`.

    A block is what transformers would checkpoint. All of one class are one compilation; so are all shapes of a batch,
    and models of one kind, one after the other. Raises InputError for a model without blocks, and for one that takes
    more than about MAX_GRAPHS graphs.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not wanted:
        yield
        return
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise InputError("--compile is for backbones of transformers, and this task's has no block of theirs")
    for block in blocks:
        # Dropout draws as it does uncompiled.
        block.forward = torch.compile(block.forward, dynamic=True, options={"fallback_random": True})
    try:
        with _room_for_graphs():
            yield
    finally:
        for block in blocks:
            del block.forward  # the class's own remains


@contextmanager
def _room_for_graphs() -> Iterator[None]:
    """Let a function have as many graphs as MAX_GRAPHS, beside those of earlier models, which are dropped beyond KEPT.

    The blocks of all models are one function to torch, which would run it uncompiled from the ninth graph on.
    """
    if counters["stats"]["unique_graphs"] > KEPT:
        torch.compiler.reset()
        counters.clear()
    try:
        with torch._dynamo.config.patch(recompile_limit=KEPT + MAX_GRAPHS, fail_on_recompile_limit_hit=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise InputError("--compile makes ever more graphs of this model: train it without") from error
