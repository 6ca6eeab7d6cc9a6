"""The surface of a run's loss, on one batch of training rows: its sharpness, and a slice around the solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from basisadapt.diagnostics.landscape import landscape
from basisadapt.diagnostics.sharpness import largest_eigenvalue
from basisadapt.tasks import Example
from basisadapt.training.config import RunConfig
from basisadapt.training.data import spread_places
from basisadapt.training.observation import adapter_parameters
from basisadapt.training.trainer import EVAL_BATCH


def measure_sharpness(trainer: Any, examples: Sequence[Example], config: RunConfig) -> float:
    """The largest eigenvalue of the Hessian of one batch's training loss; NaN where it is not asked for."""
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if config.train.sharpness is None or not parameters:
        return math.nan
    rows = [examples[place] for place in spread_places(len(examples), EVAL_BATCH)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def gradients() -> Sequence[Tensor]:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        return torch.autograd.grad(loss, parameters, materialize_grads=True)

    trainer.model.eval()
    return largest_eigenvalue(parameters, gradients, config.train.sharpness, config.seed)


def measure_landscape(trainer: Any, examples: Sequence[Example], config: RunConfig) -> dict[str, Any]:
    """The loss of one batch of training rows around the solution; empty where it is not asked for."""
    if config.train.landscape is None:
        return {}
    batch = next(iter(trainer.get_eval_dataloader(examples)))

    def loss() -> float:
        return float(trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0])

    trainer.model.eval()
    parameters = list(adapter_parameters(trainer.model).values())
    if not parameters:
        return {}
    return landscape(parameters, loss, config.train.landscape, config.seed)
