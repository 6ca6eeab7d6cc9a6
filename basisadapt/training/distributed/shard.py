"""Frozen weights in shards, one for each process of the group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn


def shard_frozen(model: nn.Module) -> None:
    """Shard every frozen weight over the group, in place, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    Each process keeps 1/n of every weight, and gathers a block of the model while it computes with it. Blocks are
    the modules that transformers does not split (`_no_split_modules`); weights outside them are gathered together.
    Trained parameters and quantized weights stay whole; DistributedDataParallel averages the gradients and ignores the
    sharded weights. The frozen weights must be equal in all processes. Checkpointing must not be reentrant, which DDP
    does not allow.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    whole = {p for p in model.parameters() if p.requires_grad or not p.is_floating_point()}
    frozen = [name for name, p in model.named_parameters() if p not in whole]
    blocks = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    # Everything is sharded again after a pass, since a process that saves alone must not gather.
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole, "reshard_after_forward": True}
    for module in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(module, **options)
    fully_shard(model, **options)
    if hasattr(model, "generate"):  # it calls the inner model directly, without this forward
        register_fsdp_forward_method(model, "generate")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """A context in which the layer's sharded weights are whole. All processes of the group must enter it."""
    sharded = [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if hasattr(parameter, "full_tensor")
    ]
    for module, name, parameter in sharded:
        setattr(module, name, nn.Parameter(parameter.full_tensor(), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter)
