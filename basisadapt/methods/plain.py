"""The references without an adapter: nothing, the task's head alone, and everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basisadapt.backbones import is_head
from basisadapt.core.errors import InputError
from basisadapt.methods.method import Method
from basisadapt.phi.settings import LowRankSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Frozen(Method, name="frozen", quantisable=False):
    """Nothing trains: the model as it was pretrained, where the task asks for no fresh head. No setting has effect."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself."""
        return model.requires_grad_(False)


class HeadOnly(Method, name="head", quantisable=False):
    """The frozen backbone with a trained head: what a task gives without an adapter. Adapter settings mean nothing."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself. Raises InputError if it has no head."""
        if not any(is_head(name) for name, _ in model.named_parameters()):
            raise InputError("method head trains the task's head, and this model has none; frozen trains nothing")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_head(name))
        return model


class FullFineTuning(Method, name="full", quantisable=False):
    """Every parameter trains. Adapter settings mean nothing."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself."""
        return model.requires_grad_(True)
