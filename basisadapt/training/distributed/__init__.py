"""Several processes of one host on one run: each takes its share of a batch, and of the frozen weights where asked.

What trains is whole in every process, and DDP averages its gradients; FSDP2 shards what is frozen, nearly all of a
large model. So clipping, saving and observing are what they are in one process.
"""

from __future__ import annotations

PARALLEL = ("ddp", "fsdp")  # what the processes share: the batches, or the frozen weights too
