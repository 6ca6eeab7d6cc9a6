"""References without an adapter: train nothing, only the task's head, or everything."""

from __future__ import annotations

from transformers import PreTrainedModel

from basisadapt.backbones import is_head
from basisadapt.core.errors import InputError
from basisadapt.methods.method import Method
from basisadapt.phi.settings import LowRankSettings


class Frozen(Method, name="frozen", quantisable=False):
    """Nothing trains: the pretrained model, unless the task adds a new head. Adapter settings have no effect."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself, with no parameter trainable."""
        return model.requires_grad_(False)


class HeadOnly(Method, name="head", quantisable=False):
    """A trained head on the frozen backbone: the baseline without an adapter. Adapter settings have no effect."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself, with only its head trainable. Raises InputError if it has no head."""
        if not any(is_head(name) for name, _ in model.named_parameters()):
            raise InputError("method head trains the task's head, and this model has none; frozen trains nothing")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_head(name))
        return model


class FullFineTuning(Method, name="full", quantisable=False):
    """Every parameter trains. Adapter settings have no effect."""

    def attach(self, model: PreTrainedModel, settings: LowRankSettings, task_type: str | None) -> PreTrainedModel:
        """The model itself, with every parameter trainable."""
        return model.requires_grad_(True)
