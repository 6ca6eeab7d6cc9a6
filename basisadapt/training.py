"""One run, top to bottom: a frozen RunConfig in, a plain RunResult out. Knows neither Optuna nor MLflow."""

from __future__ import annotations

import functools
import math
import runpy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from basisadapt import backbones, tasks
from basisadapt.backbones import FORMS, Backbone, is_head
from basisadapt.cost import Cost
from basisadapt.diagnostics.convergence import fit_power_law
from basisadapt.diagnostics.landscape import landscape
from basisadapt.diagnostics.sharpness import largest_eigenvalue
from basisadapt.distributed.group import (
    check_processes,
    in_group,
    in_the_first,
    rank,
    run_in_processes,
    shared_folder,
    sum_over_group,
)
from basisadapt.distributed.shard import shard_frozen
from basisadapt.distributed.trainer import spread
from basisadapt.environment import environment
from basisadapt.errors import InputError
from basisadapt.methods import METHODS, Method, ParameterGroup
from basisadapt.observation import Observer, adapted_layers, adapter_parameters
from basisadapt.phi.settings import LowRankSettings
from basisadapt.run_config import RunConfig
from basisadapt.settings import with_seed
from basisadapt.tasks import DataSettings, DrawnTask, Example, Rows, Task, TaskData
from basisadapt.tasks.completion import reads_rows_apart
from basisadapt.trainer import (
    EVAL_BATCH,
    arithmetic,
    early_stopping,
    logged_curves,
    make_optimizer,
    make_watch,
    trainer_arguments,
    trainer_for,
)

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

PACKED_ROWS = 6  # by which it is seen whether a backbone tells packed rows apart
SEEN_ROWS = 2 * EVAL_BATCH  # training rows that the generalisation gap is measured on


@dataclass(frozen=True)
class Plan:
    """What a run would be, from shapes alone: nothing is trained and no weight is loaded.

    factors: what trains in the modules, such as A and B; transfer: in a learned function, such as φ's α, ω and learned
    x; head: the task's head; modules: adapted modules; total: parameters of the whole model, adapter included.
    """

    modules: int
    factors: int
    transfer: int
    head: int
    total: int

    @property
    def trainable(self) -> int:
        """factors + transfer + head."""
        return self.factors + self.transfer + self.head


@dataclass(frozen=True)
class RunResult:
    """What a run gave, in plain JSON types.

    status: "finished", or "diverged" where a loss, of training or at the end, is not finite. headline: the key in
    `metrics` of the task's main metric, such as "accuracy".
    metrics: final numbers (finite ones only): the task's metrics, "eval_loss", "train_loss"; over the modules (standard
    deviations of the population) "stable_rank.mean" and ".std", the same of each kind, "stable_rank.attention.mean",
    "dc_share.mean", the mean of every `Diagnostic`, and what the method makes of its own numbers: of φ "active_n.mean",
    "utilisation.mean", "omega.mean" and ".std", "alpha.mean_abs" and "range.share", the largest of them;
    "convergence_exponent" (`diagnostics.convergence`), "update_smoothness"
    (`diagnostics.path`), "sharpness" (`diagnostics.sharpness`, where train.sharpness asks for it), "generalisation_gap"
    (the headline metric on up to 128 training rows less that on the held-out ones, where they are comparable);
    "parameters.trainable", ".factors", ".transfer", ".head"; "adapter.bytes", the
    size of the saved weights; "memory.peak_bytes" (of process 0) and "tokens_per_second" of training (`cost`);
    "seconds.train", ".eval" and ".observe", which do not overlap.
    curves: name -> [(step, value), ...]: "loss", "update_smoothness" so far, "stable_rank.attention" and so on at the
    snapshots and the end, and "eval_loss" and the task's metrics where the run evaluates on its way.
    modules: adapted module -> its numbers at the end, if its method has a ΔW: "kind", "stable_rank", "dc_share",
    "spectrum" (the leading σᵢ / σ₁), those of the diagnostics, and those of the method's `describe`.
    phi: adapted module -> {"z": [..], "phi": [..]}, a learned function: what φ adds to BA, f(z), on the range of BA
    (empty for methods without one). snapshots: [{"step", "stable_rank": {module: number}, "phi": as above}, ...] at the
    start and after 10 % and 50 % of the steps. landscape: `diagnostics.landscape` of the training loss, empty unless
    train.landscape asks.
    warnings: sentences for the user. data: fingerprint, row counts, what the task says of its rows, and the backbone's
    note where it has one. environment: versions, git commit, platform, threads, and the task's notes. accumulate: how
    many smaller batches made up a batch, see `run`.
    """

    status: str
    headline: str
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    phi: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    landscape: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    accumulate: int = 1


def plan(config: RunConfig, data_dir: Path | None = None, dry: bool = False) -> Plan:
    """Check `config` against the data's place and the model's shapes, and count. Raises InputError.

    dry: count only; a run's machine and weights, and what they need, may be missing.
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
        raise InputError(f"train.validation measures a run on training rows, which task {config.task!r} cannot")
    if task.form == "weight" and (config.train.precision, config.train.weights) != ("fp32", "fp32"):
        raise InputError(
            f"task {config.task!r} is a small change of a weight, which train.precision and weights must hold: fp32"
        )
    task.check(data_dir)
    backbone = backbones.find(config.backbone)
    if not dry:
        backbones.check_weights(config.train.weights)
        backbones.check_at_hand(backbone)
    model = backbones.shape_only(backbone, task.form, task.num_labels)
    if not dry:
        backbones.check_inputs(backbone, task.form, model, config.train.max_length)
    method = METHODS[config.method]()
    adapted = attach(model, method, config, task.form)
    return count_parameters(adapted, method.parameter_groups(adapted, _settings(config), config.train.lr))


def attach(model: PreTrainedModel, method: Method, config: RunConfig, form: str) -> PreTrainedModel | PeftModel:
    """The model with the run's method in it. Raises InputError if no module matches or r is too large."""
    r = config.adapter.r
    with warnings.catch_warnings():
        # peft asks transformers for this under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = method.attach(model, _settings(config), FORMS[form].peft)
    for name, layer in adapted_layers(adapted):
        smaller = min(layer.in_features, layer.out_features)
        if method.bounded and r > smaller:
            raise InputError(f"adapter.r must be at most {smaller}, the smaller side of {name!r}, got {r}")
    if config.train.parallel == "fsdp" and not hasattr(adapted, "peft_config"):
        raise InputError(
            f"train.parallel fsdp shards the weights below an adapter, and method {config.method!r} has none"
        )
    return adapted


def _settings(config: RunConfig) -> LowRankSettings:
    """What a method is told: the adapter's settings, with the run's seed where they have none of their own."""
    return with_seed(config.adapter, config.seed)


def count_parameters(model: PreTrainedModel | PeftModel, groups: Sequence[ParameterGroup]) -> Plan:
    """The counts, from the model itself and the groups of its method."""
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


def run(
    config: RunConfig,
    *,
    data_dir: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    save_to: Path | None = None,
    accumulate: int = 1,
) -> RunResult:
    """Train, unless the method trains nothing, and evaluate. `save_to` receives the adapter.

    `on_step(step, total)` is called after each step.

    accumulate: how many smaller batches make up a batch, which it must divide; they take less memory and more time.

    Raises InputError for what plan() would have refused; a loss that is not finite is a result, status "diverged".
    With several train.processes it starts them, see `distributed/group.py`, and returns what process 0 does.
    """
    if config.train.processes > 1 and not in_group():
        check_processes(config.train.processes)
        arguments = (config.to_mapping(), data_dir, save_to, accumulate)
        report = None if on_step is None else lambda step: on_step(*step)
        result: RunResult = run_in_processes(_in_group, arguments, config.train.processes, report)
        return result
    job = _prepare(config, data_dir)
    with shared_folder() as checkpoints, arithmetic(config.train.precision):
        trainer = _make_trainer(job, checkpoints, accumulate)
        observer, reason, of_training = _train(job, trainer, on_step)
        size = _save(job.model, save_to, checkpoints)
        finite, of_answers = _evaluate(job, trainer, measured=not reason)
        slice_of_loss = _landscape(trainer, job.ask(_spread(job.encoded.train, EVAL_BATCH)), config)
    observer.end()
    curves = {**logged_curves(trainer.state.log_history), **observer.curves(trainer.state.global_step)}
    law = fit_power_law(curves.get("loss", []))
    metrics = {
        **of_answers,
        **of_training,
        **observer.metrics(),
        "convergence_exponent": law.exponent if law else math.nan,
        **{f"parameters.{part}": getattr(job.counts, part) for part in ("factors", "transfer", "head", "trainable")},
        "adapter.bytes": size,
        "seconds.observe": observer.seconds,
    }
    return RunResult(
        status="finished" if finite and not reason else "diverged",
        headline=job.task.headline,
        metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        curves=curves,
        modules=observer.modules,
        phi=observer.phi,
        snapshots=observer.snapshots,
        landscape=slice_of_loss,
        warnings=[
            *_left_out(job.encoded),
            *([reason] if reason else []),
            *observer.warnings(job.method.why_constant(_settings(config))),
        ],
        data=_about(job),
        environment={**environment(), **job.task.notes},
        accumulate=accumulate,
    )


@dataclass(frozen=True)
class _Job:
    """What a run works with. method: serves this run alone. model: with the method in it. groups: the method's."""

    config: RunConfig
    task: Task
    data: TaskData
    encoded: _Encoded
    backbone: Backbone
    processor: Any
    method: Method
    model: Any
    groups: Sequence[ParameterGroup]
    counts: Plan

    def ask(self, rows: Rows) -> Sequence[Example]:
        """The rows as questions."""
        return self.task.examples(rows, self.processor, self.config.train.max_length, training=False)

    def measure(self, answers: np.ndarray, rows: Rows) -> dict[str, float]:
        """The task's metrics; process 0 finds them, as it may ask a judge."""
        return in_the_first(self.task.measure)(answers, rows, self.processor)


def _prepare(config: RunConfig, data_dir: Path | None) -> _Job:
    """Read the data, load the backbone and put the method into it."""
    import transformers

    task = tasks.find(config.task, config.data)
    data = load_data(config, data_dir)
    transformers.set_seed(config.seed)
    backbone = backbones.find(config.backbone)
    base, processor = backbones.load(backbone, task.form, task.num_labels, config.train.weights, data.prompts)
    method = METHODS[config.method]()
    model = attach(base, method, config, task.form)
    groups = method.parameter_groups(model, _settings(config), config.train.lr)
    counts = count_parameters(model, groups)
    encoded = _encode(_Portion.of(config, data, processor))
    if config.train.parallel == "fsdp":
        shard_frozen(model)
    return _Job(config, task, data, encoded, backbone, processor, method, model, groups, counts)


def _make_trainer(job: _Job, checkpoints: Path, accumulate: int) -> Trainer:
    """The Trainer, and the model where it trains. Raises InputError for a backbone that cannot have packed rows."""
    import transformers

    config, task, examples = job.config, job.task, job.encoded.examples
    trainer = spread(trainer_for(task), in_step=config.train.parallel == "fsdp")(
        model=job.model,
        args=trainer_arguments(config, len(examples), task.headline, checkpoints, accumulate),
        train_dataset=examples,
        eval_dataset=job.encoded.questions,
        data_collator=task.collator(job.processor),
        processing_class=job.processor,
        compute_metrics=lambda output: job.measure(output.predictions, job.encoded.held_out),
        optimizers=(make_optimizer(job.model, job.groups, config.train), None),
        callbacks=early_stopping(config.train.patience),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if config.data.packed and task.form == "completion":
        _check_packed(job.model, examples, job.processor, config.backbone)
    return trainer


def _train(
    job: _Job, trainer: Trainer, on_step: Callable[[int, int], None] | None
) -> tuple[Observer, str, dict[str, float]]:
    """Train what trains. Returns who has watched, why it ended early, if it did, and metrics."""
    observer, cost = Observer(job.model, job.method, job.groups), Cost(job.model)
    own = job.model, _settings(job.config)
    watch = make_watch(
        cost.aside(observer.step),
        on_step,
        functools.partial(job.method.before_step, *own),
        functools.partial(job.method.after_step, *own),
    )
    trainer.add_callback(watch)
    sharpness = _sharpness(trainer, job.encoded.examples, job.config)
    with cost:
        began = time.perf_counter()
        loss = trainer.train().training_loss if job.counts.trainable else math.nan
        seconds = time.perf_counter() - began - observer.seconds
    metrics = {"train_loss": loss, "sharpness": sharpness, **cost.metrics(seconds), "seconds.train": seconds}
    metrics["tokens_per_second"] = sum_over_group(metrics["tokens_per_second"])
    return observer, watch.reason, metrics


def _evaluate(job: _Job, trainer: Trainer, measured: bool) -> tuple[bool, dict[str, float]]:
    """Ask the trained model the held-out rows and training rows. Returns whether its losses are finite, and metrics:
    the task's, if it is to be `measured` and they are."""
    trainer.compute_metrics = None  # which measures the held-out rows
    began = time.perf_counter()
    answers = trainer.predict(job.encoded.questions, metric_key_prefix="eval")
    metrics = {"eval_loss": answers.metrics["eval_loss"], "seconds.eval": time.perf_counter() - began}
    seen = _spread(job.encoded.train, SEEN_ROWS)
    on_seen = trainer.predict(job.ask(seen), metric_key_prefix="seen")
    # No training loss tells what the last update did; held-out rows that are not comparable may have no loss.
    losses = [on_seen.metrics["seen_loss"], *([metrics["eval_loss"]] if job.task.comparable else [])]
    finite = all(map(math.isfinite, losses))
    if not (finite and measured):
        return finite, metrics
    scores = job.measure(answers.predictions, job.encoded.held_out)
    if job.task.comparable:
        on_seen_scores = job.measure(on_seen.predictions, seen)
        metrics["generalisation_gap"] = on_seen_scores[job.task.headline] - scores[job.task.headline]
    return finite, {**scores, **metrics}


def _save(model: Any, save_to: Path | None, checkpoints: Path) -> float:
    """Save the adapter; a whole model only where that is asked for. Returns the weights' bytes, NaN for none."""
    if (save_to is None and not hasattr(model, "peft_config")) or rank() > 0:
        return math.nan
    folder = save_to or checkpoints
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _left_out(encoded: _Encoded) -> list[str]:
    """What the user is told of training rows that were too long."""
    rows, count = len(encoded.train), len(encoded.train) - len(encoded.examples)
    reason = "have more tokens than train.max_length or the backbone allows, and were left out."
    return [f"{count} of {rows} training rows {reason}"] if count else []


def _about(job: _Job) -> dict[str, Any]:
    """What is said of the data and the backbone."""
    return {
        "fingerprint": job.data.fingerprint(),
        "train_rows": len(job.encoded.examples),
        "eval_rows": len(job.encoded.held_out),
        **job.data.about,
        **({"backbone": job.backbone.note} if job.backbone.note else {}),
    }


def _in_group(
    config: dict[str, Any], data_dir: Path | None, save_to: Path | None, accumulate: int, report: Callable[[Any], None]
) -> RunResult:
    """The run in one of several processes; process 0 reports the steps."""
    chosen, on_step = RunConfig.from_mapping(config), lambda *step: report(step)
    return run(chosen, data_dir=data_dir, on_step=on_step, save_to=save_to, accumulate=accumulate)


def load_data(config: RunConfig, data_dir: Path | None = None) -> TaskData:
    """All rows of the task, read once for as long as its files do not change. Raises InputError."""
    if isinstance(tasks.find(config.task, config.data), DrawnTask):
        return _drawn(config.task, config.data, config.seed)
    return _load(config.task, config.data, data_dir, tasks.stamp(config.task, config.data))


@functools.lru_cache(maxsize=2)
def _load(task: str, settings: DataSettings, data_dir: Path | None, stamp: tuple[tuple[int, ...], ...]) -> TaskData:
    loader = tasks.find(task, settings)
    loader.check(data_dir)
    return loader.load(data_dir)


@functools.lru_cache(maxsize=2)
def _drawn(task: str, settings: DataSettings, seed: int) -> TaskData:
    drawn = tasks.find(task, settings)
    assert isinstance(drawn, DrawnTask)
    return drawn.of_seed(seed)


@dataclass(frozen=True)
class _Portion:
    """Which rows a run trains on and is tested on, and for which backbone: what their examples follow from."""

    data: TaskData
    task: str
    settings: DataSettings
    backbone: str
    max_length: int | None
    train_rows: int | None
    eval_rows: int | None
    validation: float | None
    processor: Any = field(compare=False)

    @staticmethod
    def of(config: RunConfig, data: TaskData, processor: Any) -> _Portion:
        train = config.train
        rows = train.max_length, train.train_rows, train.eval_rows, train.validation
        return _Portion(data, config.task, config.data, config.backbone, *rows, processor)


@dataclass(frozen=True)
class _Encoded:
    """Training rows and their examples, of which too long ones are missing; rows for the test and their questions."""

    train: Rows
    examples: Sequence[Example]
    held_out: Rows
    questions: Sequence[Example]


@functools.lru_cache(maxsize=2)
def _encode(portion: _Portion) -> _Encoded:
    """The rows as the backbone takes them, encoded once for the cells of a process that share them."""
    task = tasks.find(portion.task, portion.settings)
    train, held_out = portion.data.train.head(portion.train_rows), portion.data.eval
    if portion.validation is not None:
        train, held_out = train.split(portion.validation)
    held_out = held_out.head(portion.eval_rows)
    encode = functools.partial(task.examples, processor=portion.processor, max_length=portion.max_length)
    held_out, questions = _longest_first(held_out, encode(held_out, training=False))
    return _Encoded(train, encode(train, training=True), held_out, questions)


def _longest_first(rows: Rows, examples: Sequence[Example]) -> tuple[Rows, Sequence[Example]]:
    """Rows and their examples by length, so that a batch is hardly padded; as they are where they have no length."""
    if not isinstance(examples, list) or "input_ids" not in examples[0]:
        return rows, examples
    order = sorted(range(len(rows)), key=lambda i: -len(examples[i]["input_ids"]))
    return rows.take(order), [examples[i] for i in order]


def _check_packed(model: Any, examples: Sequence[Example], processor: Any, backbone: str) -> None:
    """Raise InputError where the backbone would read packed rows into one another."""
    few = [examples[place] for place in _places(len(examples), PACKED_ROWS)]
    model.eval()
    if not reads_rows_apart(model, few, processor.pad_token_id):
        raise InputError(f"backbone {backbone!r} does not tell packed rows apart; set data.packed=false")


def _spread(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spread."""
    return rows.take(_places(len(rows), count))


def _places(size: int, count: int) -> range:
    count = min(count, size)
    return range(0, size // count * count, size // count)


def _sharpness(trainer: Any, examples: Sequence[Example], config: RunConfig) -> float:
    """The largest eigenvalue of the Hessian of one batch's training loss; NaN where it is not asked for."""
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if config.train.sharpness is None or not parameters:
        return math.nan
    rows = [examples[place] for place in _places(len(examples), EVAL_BATCH)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def gradients() -> Sequence[Tensor]:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        return torch.autograd.grad(loss, parameters, materialize_grads=True)

    trainer.model.eval()
    return largest_eigenvalue(parameters, gradients, config.train.sharpness, config.seed)


def _landscape(trainer: Any, examples: Sequence[Example], config: RunConfig) -> dict[str, Any]:
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


if __name__ == "__main__":  # the program that does many of these lies on a floor above
    runpy.run_module("basisadapt.execution", run_name="__main__")
