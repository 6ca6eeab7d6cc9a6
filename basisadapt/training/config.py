"""RunConfig: everything that decides a run's numbers, validated once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from basisadapt import backbones, tasks
from basisadapt.backbones import QUANTISED, WEIGHTS
from basisadapt.core.errors import InputError, require, unknown
from basisadapt.core.settings import field_names, from_mapping, late, unknown_key, without_late
from basisadapt.methods import METHODS
from basisadapt.phi.settings import LowRankSettings
from basisadapt.tasks import DataSettings
from basisadapt.training.distributed import PARALLEL

SCHEDULES = ("linear", "cosine", "constant")
SEEDS = 2**32  # numpy accepts seeds below it
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a run trains: AdamW with β = (0.9, 0.999) (paper, Table 10).

    - `lr` (float > 0, default 2e-3): base learning rate, of A, B and the task's head.
    - `epochs` (float > 0, default 3): passes over the training rows.
    - `max_steps` (int ≥ 1 or None, default None): optimizer steps; overrides `epochs`.
    - `batch_size` (int ≥ 1, default 16): rows per optimizer step, over all processes.
    - `max_length` (int ≥ 1 or None, default None): tokens per row; None uses the task's own, which the run's
      configuration then records.
    - `schedule` (str, default "linear"): "linear", "cosine" or "constant", after the warm-up.
    - `warmup_ratio` (float in [0, 1), default 0.06): the share of the steps that warm up.
    - `weight_decay` (float ≥ 0, default 0): decoupled weight decay of A, B and the head.
    - `max_grad_norm` (float > 0, default 1): the norm to which the gradient is clipped.
    - `precision` (str, default "fp32"): "fp32"; "tf32", which on a GPU rounds the operands of matrix products to ten
      bits; or "bf16" or "fp16" by autocast.
    - `weights` (str, default "fp32"): the storage of the frozen backbone: "fp32", "bf16", or quantized by bitsandbytes
      to "int8" or "nf4". Adapter and head stay in float32.
    - `gradient_checkpointing` (bool, default False): recompute activations in the backward pass instead of storing
      them.
    - `eval_steps` (int ≥ 1 or None, default None): evaluate after every so many steps, and keep the best checkpoint;
      None evaluates once, at the end.
    - `patience` (int ≥ 1 or None, default None): stop after so many evaluations without an improvement; needs
      `eval_steps`.
    - `train_rows` (int ≥ 1 or None, default None): train on the first so many rows; None uses all.
    - `eval_rows` (int ≥ 1 or None, default None): evaluate on the first so many rows; None uses all.
    - `validation` (float in (0, 1) or None, default None): hold out this share of the training rows, the last ones, and
      evaluate on them instead of the held-out rows, so that choices are made before those are seen.
    - `landscape` (odd int ≥ 3 or None, default None): after training, evaluate the loss on a slice around the solution
      with so many points per side.
    - `processes` (int ≥ 1, default 1): processes on this host, one for each GPU, that divide every batch; must divide
      `batch_size`.
    - `parallel` (str, default "ddp"): "ddp" divides the batches, "fsdp" also the frozen weights (see
      `training.distributed.shard`). Either trains as one process does, up to rounding and dropout's random numbers.
    - `group_by_length` (bool, default False): form batches of texts of similar length, which need little padding, in
      random order; needs one process.
    - `sharpness` (int ≥ 1 or None, default None): before training, find the largest eigenvalue of the Hessian of the
      loss in the trained parameters, by so many steps of power iteration on one batch; needs one process.

    Raises InputError for a value out of range.
    """

    lr: float = 2e-3
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    max_length: int | None = None
    schedule: str = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    weights: str = "fp32"
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    patience: int | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    validation: float | None = None
    landscape: int | None = None
    processes: int = 1
    parallel: str = "ddp"
    group_by_length: bool = late(False)
    sharpness: int | None = late(None)

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "train.lr", self.lr, "above 0")
        require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "above 0")
        require(self.schedule in SCHEDULES, "train.schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        require(0 <= self.warmup_ratio < 1, "train.warmup_ratio", self.warmup_ratio, "in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "train.weight_decay", self.weight_decay, "at least 0")
        require(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "above 0")
        require(self.precision in PRECISIONS, "train.precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(self.weights in WEIGHTS, "train.weights", self.weights, f"one of {', '.join(WEIGHTS)}")
        optional = ("max_steps", "max_length", "eval_steps", "patience", "train_rows", "eval_rows", "sharpness")
        for name in ("batch_size", *optional):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", value, "at least 1")
        share = self.validation is None or 0 < self.validation < 1
        require(share, "train.validation", self.validation, "between 0 and 1")
        odd = self.landscape is None or (self.landscape >= 3 and self.landscape % 2 == 1)
        require(odd, "train.landscape", self.landscape, "an odd number of at least 3, whose middle is the solution")
        paired = self.patience is None or self.eval_steps is not None
        require(paired, "train.patience", self.patience, "used together with train.eval_steps")
        divides = self.processes >= 1 and self.batch_size % self.processes == 0
        require(divides, "train.processes", self.processes, f"a divisor of train.batch_size, {self.batch_size}")
        require(self.parallel in PARALLEL, "train.parallel", self.parallel, f"one of {', '.join(PARALLEL)}")
        alone, whole, mixed = self.processes == 1, self.parallel == "ddp", self.group_by_length
        require(alone or not mixed, "train.group_by_length", mixed, "false with several train.processes")
        require(alone or self.sharpness is None, "train.sharpness", self.sharpness, "null with several train.processes")
        several = "used together with train.processes of at least 2"
        require(whole or not alone, "train.parallel", self.parallel, several)
        no_shards = f"ddp with train.weights {self.weights}, which has no shards"
        require(whole or self.weights not in QUANTISED, "train.parallel", self.parallel, no_shards)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's numbers. Equal configurations on one machine give equal results.

    - `task` (str): the name of the task, see `tasks.find`.
    - `backbone` (str): the name of the pretrained model, see `backbones.find`.
    - `method` (str): the name of a registered method.
    - `adapter`: the method's settings.
    - `train`: how the run trains.
    - `data`: how the task's data are read.
    - `seed` (int in [0, 2³²)): of everything random in the run.
    """

    task: str
    backbone: str
    method: str
    adapter: LowRankSettings
    train: TrainSettings
    data: DataSettings
    seed: int

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> RunConfig:
        """Validate a plain nested mapping. Keys that are left out get their defaults.

        Adapter settings that only other methods have are checked and dropped. Raises InputError for an unknown task,
        backbone, method or key, a wrong type, or a value out of range.
        """
        keys = from_mapping(_Keys, values)
        require(0 <= keys.seed < SEEDS, "seed", keys.seed, f"at least 0 and below {SEEDS}")
        if keys.method not in METHODS:
            raise unknown("method", keys.method, METHODS)
        settings = METHODS[keys.method].settings
        own = {key: value for key, value in keys.adapter.items() if key in field_names(settings)}
        if foreign := {key: value for key, value in keys.adapter.items() if key not in own}:
            _check_foreign(foreign)
        data = from_mapping(DataSettings, keys.data, "data")
        task, _ = tasks.find(keys.task, data), backbones.find(keys.backbone)
        max_length = keys.train.get("max_length")
        given = {**keys.train, "max_length": task.max_length if max_length is None else max_length}
        train = from_mapping(TrainSettings, given, "train")
        if train.weights in QUANTISED and not METHODS[keys.method].quantisable:
            raise InputError(
                f"method {keys.method!r} cannot work on quantized weights; set train.weights to fp32 or bf16"
            )
        return RunConfig(
            task=keys.task,
            backbone=keys.backbone,
            method=keys.method,
            adapter=from_mapping(settings, own, "adapter"),
            train=train,
            data=data,
            seed=keys.seed,
        )

    def to_mapping(self) -> dict[str, Any]:
        """The canonical nested mapping, of JSON types and with every default; the inverse of `from_mapping`."""
        # dataclasses.asdict would copy every value, and a study of thousands of cells asks for each of them ten times.
        mapping = _fields(self)
        return {**mapping, **{name: _fields(mapping[name]) for name in ("adapter", "train", "data")}}


def _fields(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in field_names(type(settings))}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's canonical mapping that identifies it: all but the late settings at their defaults."""
    adapter = METHODS[config.get("method", _Keys.method)].settings
    parts = {"adapter": adapter, "train": TrainSettings, "data": DataSettings}
    return {**config, **{name: without_late(cls, config[name]) for name, cls in parts.items() if name in config}}


def _check_foreign(values: Mapping[str, Any]) -> None:
    """Check adapter settings that the run's method does not have against the methods that do. Raises InputError."""
    known = adapter_keys()
    for key in values:
        if key not in known:
            raise unknown_key(f"adapter.{key}", [f"adapter.{name}" for name in known])
    for settings in dict.fromkeys(METHODS[name].settings for name in METHODS):
        theirs = {key: value for key, value in values.items() if key in field_names(settings)}
        from_mapping(settings, theirs, "adapter")


def adapter_keys() -> list[str]:
    """The names of the adapter settings of all methods, each once."""
    return list(dict.fromkeys(key for name in METHODS for key in field_names(METHODS[name].settings)))


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """The keys of a run's mapping; the defaults are the example that needs no download."""

    task: str = "docstrings"
    backbone: str = "minilm"
    method: str = "phi"
    adapter: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    seed: int = 42
