"""One run, top to bottom."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers

from basisadapt import backbones, tasks
from basisadapt.backbones import Backbone
from basisadapt.core.environment import environment
from basisadapt.core.errors import InputError, refused
from basisadapt.diagnostics.convergence import fit_power_law
from basisadapt.methods import METHODS, Method, ParameterGroup
from basisadapt.methods.saved_adapter import write_requirements
from basisadapt.tasks import Example, Rows, Task, TaskData
from basisadapt.tasks.completion import reads_rows_apart
from basisadapt.training.compiled import compiled_blocks
from basisadapt.training.config import RunConfig
from basisadapt.training.cost import Cost
from basisadapt.training.data import Encoded, Portion, encode, load_data, spread_places, spread_rows
from basisadapt.training.distributed.data_parallel import distributed_trainer
from basisadapt.training.distributed.group import (
    check_processes,
    in_group,
    on_rank_zero,
    rank,
    run_in_processes,
    shared_folder,
    sum_over_group,
)
from basisadapt.training.distributed.shard import shard_frozen
from basisadapt.training.loss_surface import measure_landscape, measure_sharpness
from basisadapt.training.observation import Observer
from basisadapt.training.planning import Plan, adapter_settings, attach, count_parameters
from basisadapt.training.result import RunResult
from basisadapt.training.trainer import (
    EVAL_BATCH,
    arithmetic,
    logged_curves,
    make_optimizer,
    make_watch,
    trainer_arguments,
    trainer_for,
)

if TYPE_CHECKING:
    import numpy as np

PACKED_ROWS = 6  # rows in the check that a backbone separates packed rows
SEEN_ROWS = 2 * EVAL_BATCH  # training rows on which the generalization gap is measured


def run(
    config: RunConfig,
    *,
    data_dir: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    save_to: Path | None = None,
    accumulate: int = 1,
    compiled: bool = False,
) -> RunResult:
    """Train, unless the method trains nothing, and evaluate.

    - `data_dir` (Path or None, default None): the data folder of tasks that read files.
    - `on_step` (default None): called as on_step(step, total) after each step.
    - `save_to` (Path or None, default None): a folder for the trained adapter.
    - `accumulate` (int ≥ 1, default 1): the number of smaller batches that make up a batch, a divisor of its size; they
      take less memory and more time.
    - `compiled` (bool, default False): train with compiled blocks, see `compiled.compiled_blocks`; numbers then differ
      by rounding.

    With several train.processes it starts them, see `distributed/group.py`, and returns the result of process 0. Raises
    InputError as `plan`. A loss that is not finite gives a result with status "diverged".
    """
    if not isinstance(config, RunConfig):
        raise refused("config", config, "a RunConfig, such as RunConfig.from_mapping makes of keys and values")
    if config.train.processes > 1 and not in_group():
        check_processes(config.train.processes)
        arguments = (config.to_mapping(), data_dir, save_to, accumulate, compiled)
        report = None if on_step is None else lambda step: on_step(*step)
        return cast(RunResult, run_in_processes(_in_group, arguments, config.train.processes, report))
    job = _prepare(config, data_dir)
    with shared_folder() as checkpoints, arithmetic(config.train.precision):
        trainer = _make_trainer(job, checkpoints, accumulate)
        with compiled_blocks(job.model, compiled):
            observer, reason, of_training = _train(job, trainer, on_step)
        size = _save(job, save_to, checkpoints)
        finite, of_answers = _evaluate(job, trainer, measured=not reason)
        slice_of_loss = measure_landscape(trainer, job.encoded.ask(spread_rows(job.encoded.train, EVAL_BATCH)), config)
    observer.end()
    curves = {**logged_curves(trainer.state.log_history), **observer.curves(trainer.state.global_step)}
    metrics = {
        **of_answers,
        **of_training,
        **_of_model(job, observer, curves.get("loss", [])),
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
            *observer.warnings(job.method.why_constant(adapter_settings(config))),
        ],
        data=_about(job),
        environment={**environment(), **({"compiled": "blocks"} if compiled else {}), **job.task.notes},
        accumulate=accumulate,
    )


@dataclass(frozen=True)
class _Job:
    """The parts of a run; `model` has the method attached, and `groups` are the method's parameter groups."""

    config: RunConfig
    task: Task
    data: TaskData
    encoded: Encoded
    backbone: Backbone
    processor: Any
    method: Method
    model: Any
    groups: Sequence[ParameterGroup]
    counts: Plan

    def measure(self, answers: np.ndarray, rows: Rows) -> dict[str, float]:
        """The task's metrics, computed in process 0 alone, since it may ask a judge."""
        return on_rank_zero(self.task.measure)(answers, rows, self.processor)


def _prepare(config: RunConfig, data_dir: Path | None) -> _Job:
    """Read the data, load the backbone and attach the method."""
    task = tasks.find(config.task, config.data)
    data = load_data(config, data_dir)
    transformers.set_seed(config.seed)
    backbone = backbones.find(config.backbone)
    base, processor = backbones.load(backbone, task.form, task.num_labels, config.train.weights, data.prompts)
    method = METHODS[config.method]()
    model = attach(base, method, config, task.form)
    groups = method.parameter_groups(model, adapter_settings(config), config.train.lr)
    counts = count_parameters(model, groups)
    encoded = encode(Portion.of(config, data, processor))
    if config.train.parallel == "fsdp":
        shard_frozen(model)
    return _Job(config, task, data, encoded, backbone, processor, method, model, groups, counts)


def _make_trainer(job: _Job, checkpoints: Path, accumulate: int) -> transformers.Trainer:
    """The Trainer, which moves the model to its device. Raises InputError as `_check_packed`."""
    config, task, examples, patience = job.config, job.task, job.encoded.examples, job.config.train.patience
    trainer = distributed_trainer(trainer_for(task), in_step=config.train.parallel == "fsdp")(
        model=job.model,
        args=trainer_arguments(config, len(examples), task.headline, checkpoints, accumulate),
        train_dataset=examples,
        eval_dataset=job.encoded.questions,
        data_collator=task.collator(job.processor),
        processing_class=job.processor,
        compute_metrics=lambda output: job.measure(output.predictions, job.encoded.held_out),
        optimizers=(make_optimizer(job.model, job.groups, config.train), None),
        callbacks=[] if patience is None else [transformers.EarlyStoppingCallback(patience)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if config.data.packed and task.form == "completion":
        _check_packed(job.model, examples, job.processor, config.backbone)
    return trainer


def _train(
    job: _Job, trainer: transformers.Trainer, on_step: Callable[[int, int], None] | None
) -> tuple[Observer, str, dict[str, float]]:
    """Train. Returns the observer, the reason for an early end (empty without one), and metrics."""
    observer, cost = Observer(job.model, job.method, job.groups), Cost(job.model)
    own = job.model, adapter_settings(job.config)
    watch = make_watch(
        cost.aside(observer.step),
        on_step,
        functools.partial(job.method.before_step, *own),
        functools.partial(job.method.after_step, *own),
    )
    trainer.add_callback(watch)
    sharpness = measure_sharpness(trainer, job.encoded.examples, job.config)
    with cost:
        began = time.perf_counter()
        loss = trainer.train().training_loss if job.counts.trainable else math.nan
        seconds = time.perf_counter() - began - observer.seconds
    metrics = {"train_loss": loss, "sharpness": sharpness, **cost.metrics(seconds), "seconds.train": seconds}
    metrics["tokens_per_second"] = sum_over_group(metrics["tokens_per_second"])
    return observer, watch.reason, metrics


def _evaluate(job: _Job, trainer: transformers.Trainer, measured: bool) -> tuple[bool, dict[str, float]]:
    """Evaluate the trained model on held-out and on training rows. Returns whether its losses are finite, and metrics.

    The task's own metrics are among them if `measured` and if the losses are finite.
    """
    trainer.compute_metrics = None  # which measures the held-out rows
    began = time.perf_counter()
    answers = trainer.predict(job.encoded.questions, metric_key_prefix="eval")
    metrics = {"eval_loss": answers.metrics["eval_loss"], "seconds.eval": time.perf_counter() - began}
    seen = spread_rows(job.encoded.train, SEEN_ROWS)
    on_seen = trainer.predict(job.encoded.ask(seen), metric_key_prefix="seen")
    # Training losses do not show the effect of the last update; rows that are not comparable may have no loss.
    losses = [on_seen.metrics["seen_loss"], *([metrics["eval_loss"]] if job.task.comparable else [])]
    finite = all(map(math.isfinite, losses))
    if not (finite and measured):
        return finite, metrics
    scores = job.measure(answers.predictions, job.encoded.held_out)
    if job.task.comparable:
        on_seen_scores = job.measure(on_seen.predictions, seen)
        metrics["generalisation_gap"] = on_seen_scores[job.task.headline] - scores[job.task.headline]
    return finite, {**scores, **metrics}


def _save(job: _Job, save_to: Path | None, checkpoints: Path) -> float:
    """Save the adapter; a whole model only into `save_to`. Returns the weights' size in bytes, NaN if not saved."""
    is_adapter = hasattr(job.model, "peft_config")
    if (save_to is None and not is_adapter) or rank() > 0:
        return math.nan
    folder = save_to or checkpoints
    job.model.save_pretrained(folder)
    if save_to is not None and is_adapter:
        write_requirements(save_to, job.task.form, job.task.num_labels, job.config.to_mapping(), job.data.classes)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _of_model(job: _Job, observer: Observer, losses: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The metrics of the updates, of the fall of the training loss, and of the parameters."""
    law = fit_power_law(losses)
    return {
        **observer.metrics(),
        "convergence_exponent": law.exponent if law else math.nan,
        **{f"parameters.{part}": getattr(job.counts, part) for part in ("factors", "transfer", "head", "trainable")},
    }


def _left_out(encoded: Encoded) -> list[str]:
    """A warning about training rows that were too long, if there are any."""
    rows, count = len(encoded.train), len(encoded.train) - len(encoded.examples)
    reason = "have more tokens than train.max_length or the backbone allows, and were left out."
    return [f"{count} of {rows} training rows {reason}"] if count else []


def _about(job: _Job) -> dict[str, Any]:
    """What the result records about the data and the backbone."""
    return {
        "fingerprint": job.data.fingerprint(),
        "train_rows": len(job.encoded.examples),
        "eval_rows": len(job.encoded.held_out),
        **job.data.about,
        **({"backbone": job.backbone.note} if job.backbone.note else {}),
    }


def _in_group(
    config: dict[str, Any],
    data_dir: Path | None,
    save_to: Path | None,
    accumulate: int,
    compiled: bool,
    report: Callable[[Any], None],
) -> RunResult:
    """The run in one of several processes; process 0 reports its steps."""
    chosen, on_step = RunConfig.from_mapping(config), lambda *step: report(step)
    return run(chosen, data_dir=data_dir, on_step=on_step, save_to=save_to, accumulate=accumulate, compiled=compiled)


def _check_packed(model: Any, examples: Sequence[Example], processor: Any, backbone: str) -> None:
    """Raise InputError if the backbone does not separate packed rows."""
    few = [examples[place] for place in spread_places(len(examples), PACKED_ROWS)]
    model.eval()
    if not reads_rows_apart(model, few, processor.pad_token_id):
        raise InputError(f"backbone {backbone!r} does not tell packed rows apart; set data.packed=false")
