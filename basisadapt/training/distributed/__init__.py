"""One run in several processes of a host: each takes a share of every batch and, with "fsdp", of the frozen weights.

Trained parameters are whole in every process, and DDP averages their gradients; FSDP2 shards the frozen ones, which are
nearly all of a large model. So clipping, saving and observing work as in one process.
"""

from __future__ import annotations

PARALLEL = ("ddp", "fsdp")  # what is divided among the processes: batches, or the frozen weights too
