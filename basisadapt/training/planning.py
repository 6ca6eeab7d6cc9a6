"""Checks a run and counts its parameters before it starts, from shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from basisadapt import backbones, tasks
from basisadapt.backbones import FORMS, ROUNDED, is_head
from basisadapt.core.errors import InputError, one_line, require
from basisadapt.core.registry import loaded_plugins
from basisadapt.core.settings import with_seed
from basisadapt.methods import METHODS, Method, ParameterGroup
from basisadapt.phi.settings import LowRankSettings
from basisadapt.training.config import RunConfig
from basisadapt.training.distributed.group import check_processes
from basisadapt.training.observation import adapted_layers


@dataclass(frozen=True)
class Plan:
    """The size of a run, from shapes alone: nothing is trained and no weights are loaded.

    - `modules` (int): adapted modules.
    - `factors` (int): trained parameters of the modules, such as A and B.
    - `transfer` (int): trained parameters of a learned function, such as φ's α, ω and learned x.
    - `head` (int): trained parameters of the task's head.
    - `total` (int): parameters of the whole model, including the adapter.
    """

    modules: int
    factors: int
    transfer: int
    head: int
    total: int

    @property
    def trainable(self) -> int:
        """All trained parameters: factors + transfer + head."""
        return self.factors + self.transfer + self.head


def plan(config: RunConfig, data_dir: Path | None = None, dry: bool = False) -> Plan:
    """Check `config` against the data folder, the machine and the model's shapes, and count the parameters.

    dry: only count; the GPUs, the weights, and the packages they need may be missing. Raises InputError for whatever
    would make the run fail.
    """
    if not dry:
        check_processes(config.train.processes)
        if config.train.precision == "fp16" and not torch.cuda.is_available():
            raise InputError("train.precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    task = tasks.find(config.task, config.data)
    if config.train.group_by_length and task.form not in ("text", "completion"):
        raise InputError(f"train.group_by_length is for texts, and task {config.task!r} has none; leave it at false")
    if config.data.packed and config.train.processes > 1:
        raise InputError("data.packed is for one process; set it to false, or train.processes to 1")
    if config.train.validation is not None and not task.comparable:
        raise InputError(f"train.validation evaluates on training rows, which task {config.task!r} cannot do")
    if task.form == "weight" and (config.train.precision, config.train.weights) != ("fp32", "fp32"):
        raise InputError(
            f"task {config.task!r} is a small change of a weight; train.precision and train.weights must be fp32"
        )
    if task.form in ROUNDED and config.train.weights != "fp32":
        raise InputError(f"task {config.task!r} rounds the weights itself; train.weights must be fp32")
    task.check(data_dir)
    backbone = backbones.find(config.backbone)
    if backbone.drawn and config.train.weights != "fp32":
        raise InputError(f"backbone {config.backbone!r} has random weights, in float32; train.weights must be fp32")
    if not dry:
        backbones.check_weights(config.train.weights)
        backbones.check_at_hand(backbone)
    model = backbones.shape_only(backbone, task.form, task.num_labels)
    if not dry:
        backbones.check_inputs(backbone, task.form, model, config.train.max_length)
    method = METHODS[config.method]()
    try:
        adapted = attach(model, method, config, task.form)
    except Exception as error:
        if isinstance(error, InputError) or not loaded_plugins():
            raise
        raise InputError(f"a plug-in of method {config.method!r} does not work: {one_line(error)}") from error
    return count_parameters(adapted, method.parameter_groups(adapted, adapter_settings(config), config.train.lr))


def attach(model: PreTrainedModel, method: Method, config: RunConfig, form: str) -> PreTrainedModel | PeftModel:
    """The model with the run's method attached. Raises InputError if no module matches or r is too large."""
    r = config.adapter.r
    with warnings.catch_warnings():
        # peft uses a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = method.attach(model, adapter_settings(config), FORMS[form].peft)
    for name, layer in adapted_layers(adapted):
        smaller = min(layer.in_features, layer.out_features)
        require(not method.bounded or r <= smaller, "adapter.r", r, f"at most {smaller}, the smaller side of {name!r}")
    if config.train.parallel == "fsdp" and not hasattr(adapted, "peft_config"):
        raise InputError(
            f"train.parallel fsdp shards the weights below an adapter, but method {config.method!r} has none"
        )
    return adapted


def adapter_settings(config: RunConfig) -> LowRankSettings:
    """The adapter's settings as the method gets them: the run's seed replaces every seed that is None."""
    return with_seed(config.adapter, config.seed)


def count_parameters(model: PreTrainedModel | PeftModel, groups: Sequence[ParameterGroup]) -> Plan:
    """Count the parameters of a model with its method attached; groups: those of the method."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if is_head(name))
    transfer = sum(p.numel() for group in groups if group.transfer for p in group.parameters)
    return Plan(
        modules=sum(1 for _ in adapted_layers(model)),
        factors=sum(trainable.values()) - head - transfer,
        transfer=transfer,
        head=head,
        total=sum(p.numel() for p in model.parameters()),
    )
