"""A run whose blocks torch.compile has fused: far fewer kernels a step, which is what bounds a small model on a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from basisadapt.core.errors import InputError


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

    A block is what transformers would checkpoint. All of one class are one compilation; so are all shapes of a batch.
    Raises InputError for a model without blocks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    if wanted and not blocks:
        raise InputError("--compile is for backbones of transformers, and this task's has no block of theirs")
    for block in blocks:
        # Dropout draws as it does uncompiled.
        block.forward = torch.compile(block.forward, dynamic=True, options={"fallback_random": True})
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own remains
