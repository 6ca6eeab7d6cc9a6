"""The references without an adapter: the task's head alone, and everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basisadapt.backbones import is_head
from basisadapt.errors import InputError
from basisadapt.methods.method import Method
from basisadapt.phi.settings import LowRankSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeadOnly(Method, name="head"):
    """The frozen backbone with a trained head: what a task gives without an adapter. Adapter settings mean nothing."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_head(name))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError("method 'head' trains a head, and this model's task has none that trains")
        return model

    def parameters(self, settings: LowRankSettings, out_features: int, in_features: int) -> int:
        """None."""
        return 0


class FullFineTuning(Method, name="full"):
    """Every parameter trains. Adapter settings mean nothing."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself."""
        return model.requires_grad_(True)

    def parameters(self, settings: LowRankSettings, out_features: int, in_features: int) -> int:
        """None: it has no adapted modules."""
        return 0
