"""What the tests of backbones share."""

from __future__ import annotations

import json

from basisadapt.training.config import RunConfig


def config(backbone, **values):
    """A short run with a small adapter."""
    train = {"max_steps": 2, "batch_size": 4, "train_rows": 16, "eval_rows": 8, **values.pop("train", {})}
    return RunConfig.from_mapping({"backbone": str(backbone), "adapter": {"r": 2}, "train": train, **values})


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
