"""One run, top to bottom: a frozen RunConfig in, a plain RunResult out. Knows neither Optuna nor MLflow."""

from __future__ import annotations

import dataclasses
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
from basisadapt.backbones import FORMS, is_head
from basisadapt.cost import Cost
from basisadapt.diagnostics.convergence import fit_power_law
from basisadapt.diagnostics.landscape import landscape
from basisadapt.distributed.group import (
    check_processes,
    in_group,
    in_the_first,
    rank,
    run_in_processes,
    shared_folder,
    sum_over_group,
    world_size,
)
from basisadapt.distributed.shard import gathering, shard_frozen
from basisadapt.distributed.trainer import spread
from basisadapt.environment import environment
from basisadapt.errors import InputError
from basisadapt.methods import METHODS
from basisadapt.observation import (
    CURVE_POINTS,
    Observer,
    WeightChange,
    adapted_layers,
    adapter_parameters,
    observe,
    summary,
)
from basisadapt.phi.settings import PhiSettings, field_names
from basisadapt.run_config import RunConfig
from basisadapt.tasks import DataSettings, Example, Rows, Task, TaskData

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

EVAL_BATCH = 64
SEEN_ROWS = 2 * EVAL_BATCH  # training rows that the generalisation gap is measured on


@dataclass(frozen=True)
class Plan:
    """What a run would be, from shapes alone: nothing is trained and no weight is loaded.

    factors: what trains in the modules, such as A and B; transfer: in φ (α, ω, learned x); head: the task's head;
    modules: adapted modules; total: parameters of the whole model, adapter included.
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

    status: "finished", or "diverged" where the loss stopped being finite. headline: the key in `metrics` of the task's
    main metric, such as "accuracy".
    metrics: final numbers (finite ones only): the task's metrics, "eval_loss", "train_loss"; over the modules (standard
    deviations of the population) "stable_rank.mean" and ".std", the same of each kind, "stable_rank.attention.mean",
    "dc_share.mean" and, of φ, "active_n.mean", "utilisation.mean", "omega.mean" and ".std", "alpha.mean_abs" and
    "range.share", the largest of them; "convergence_exponent" (`diagnostics.convergence`), "update_smoothness"
    (`diagnostics.path`), "generalisation_gap" (the headline metric on up to 128 training rows less that on the held-out
    ones, where they are comparable); "parameters.trainable", ".factors", ".transfer", ".head"; "adapter.bytes", the
    size of the saved weights; "memory.peak_bytes" (of process 0) and "tokens_per_second" of training (`cost`);
    "seconds.train", ".eval" and ".observe", which do not overlap.
    curves: name -> [(step, value), ...]: "loss", "update_smoothness" so far, "stable_rank.attention" and so on at the
    snapshots and the end, and "eval_loss" and the task's metrics where the run evaluates on its way.
    modules: adapted module -> its numbers at the end, if its method has a ΔW: "kind", "stable_rank", "dc_share",
    "spectrum" (the leading σᵢ / σ₁); of φ "active_n", "utilisation", "omega_mean", "omega_std", "alpha_mean",
    "alpha_std", "alpha_mean_abs", "range_share" (max |g·BA| / I, the part of the grid's interval that BA reaches).
    phi: adapted module -> {"z": [..], "phi": [..]}, what φ adds to BA, f(z), on the range of BA (empty for methods
    without φ). snapshots: [{"step", "stable_rank": {module: number}, "phi": as above}, ...] at the start and after 10 %
    and 50 % of the steps. landscape: `diagnostics.landscape` of the training loss, empty unless train.landscape asks.
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
    if config.train.validation is not None and not task.comparable:
        raise InputError(f"train.validation measures a run on training rows, which task {config.task!r} cannot")
    task.check(data_dir)
    backbone = backbones.find(config.backbone)
    if not dry:
        backbones.check_weights(config.train.weights)
        backbones.check_at_hand(backbone)
    return count_parameters(attach(backbones.shape_only(backbone, task.form, task.num_labels), config, task.form))


def attach(model: PreTrainedModel, config: RunConfig, form: str) -> PreTrainedModel | PeftModel:
    """The model with the configured method in it. Raises InputError if no module matches or r is too large."""
    method, settings = METHODS[config.method](), config.adapter
    seeds = {name for name in field_names(type(settings)) if name.endswith("_seed")}
    unset: dict[str, Any] = {name: config.seed for name in seeds if getattr(settings, name) is None}
    with warnings.catch_warnings():
        # peft asks transformers for this under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = method.attach(model, dataclasses.replace(settings, **unset), FORMS[form].peft)
    for name, layer in adapted_layers(adapted):
        smaller = min(layer.in_features, layer.out_features)
        if method.bounded and settings.r > smaller:
            raise InputError(f"adapter.r must be at most {smaller}, the smaller side of {name!r}, got {settings.r}")
    if config.train.parallel == "fsdp" and not hasattr(adapted, "peft_config"):
        raise InputError(
            f"train.parallel fsdp shards the weights below an adapter, and method {config.method!r} has none"
        )
    return adapted


def count_parameters(model: PreTrainedModel | PeftModel) -> Plan:
    """The counts, from the model itself."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if is_head(name))
    transfer = sum(count for name, count in trainable.items() if ".phi_bank." in name)
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

    accumulate: how many smaller batches make up a batch, which it must divide, each with the same weight; they take
    less memory and more time.

    Raises InputError for what plan() would have refused; a loss that is not finite is a result, status "diverged".
    With several train.processes it starts them, see `distributed/group.py`, and returns what process 0 does.
    """
    if config.train.processes > 1 and not in_group():
        check_processes(config.train.processes)
        arguments = (config.to_mapping(), data_dir, save_to, accumulate)
        report = None if on_step is None else lambda step: on_step(*step)
        result: RunResult = run_in_processes(_in_group, arguments, config.train.processes, report)
        return result
    import transformers

    task = tasks.find(config.task, config.data)
    data = load_data(config, data_dir)
    train, held_out = data.train.head(config.train.train_rows), data.eval
    if config.train.validation is not None:
        train, held_out = train.split(config.train.validation)
    held_out = held_out.head(config.train.eval_rows)
    transformers.set_seed(config.seed)
    backbone = backbones.find(config.backbone)
    base, processor = backbones.load(backbone, task.form, task.num_labels, config.train.weights, data.prompts)
    model = attach(base, config, task.form)
    counts = count_parameters(model)
    encode = functools.partial(task.examples, processor=processor, max_length=config.train.max_length)
    held_out, questions = _longest_first(held_out, encode(held_out, training=False))
    seen, examples = _spread(train, SEEN_ROWS), encode(train, training=True)
    measure = in_the_first(task.measure)  # which may ask a judge
    method = METHODS[config.method]()
    weight_change: WeightChange = method.weight_change
    sharded = config.train.parallel == "fsdp"
    if sharded:
        shard_frozen(model)
        weight_change = gathering(weight_change)

    with shared_folder() as checkpoints:
        trainer = spread(_trainer_for(task), in_step=sharded)(
            model=model,
            args=_arguments(config, len(examples), task.headline, checkpoints, accumulate),
            train_dataset=examples,
            eval_dataset=questions,
            data_collator=task.collator(processor),
            processing_class=processor,
            compute_metrics=lambda output: measure(output.predictions, held_out, processor),
            optimizers=(_optimizer(model, config), None),
            callbacks=_early_stopping(config.train.patience),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if accumulate > 1:
            # Else the Trainer sums the losses of the smaller batches where a model's forward takes any keyword, for a
            # loss that divides by the whole batch, which BERT's does not.
            trainer.model_accepts_loss_kwargs = False
        observer = Observer(model, weight_change)  # only now is the model where it trains
        cost = Cost(model)
        watch = _watch(
            cost.aside(observer.step),
            on_step,
            lambda step, total: method.after_step(model, config.adapter, step, total),
        )
        trainer.add_callback(watch)
        with cost:
            began = time.perf_counter()
            training_loss = trainer.train().training_loss if counts.trainable else math.nan
            trained = time.perf_counter()
        trainer.compute_metrics = None  # which measures the held-out rows
        output = trainer.predict(questions, metric_key_prefix="eval")
        evaluated = time.perf_counter()
        on_seen = trainer.predict(encode(seen, training=False)).predictions if task.comparable else None
        slice_of_loss = _landscape(trainer, encode(_spread(train, EVAL_BATCH), training=False), config)
        size = math.nan
        # A whole model is written where it is asked for only.
        if (save_to is not None or hasattr(model, "peft_config")) and rank() == 0:
            model.save_pretrained(save_to or checkpoints)
            size = sum(file.stat().st_size for file in Path(save_to or checkpoints).glob("*.safetensors"))

    described = time.perf_counter()
    modules, phi = observe(model, weight_change)
    observing = observer.seconds + time.perf_counter() - described
    curves = {**_curves(trainer.state.log_history), **observer.curves(modules, trainer.state.global_step)}
    law = fit_power_law(curves.get("loss", []))
    scores, gap = {}, math.nan
    if not watch.diverged:
        scores = measure(output.predictions, held_out, processor)
        if on_seen is not None:
            gap = measure(on_seen, seen, processor)[task.headline] - scores[task.headline]
    training_seconds = trained - began - observer.seconds
    costs = cost.metrics(training_seconds)
    metrics = {
        **scores,
        "eval_loss": output.metrics["eval_loss"],
        "train_loss": training_loss,
        **summary(modules),
        "convergence_exponent": law.exponent if law else math.nan,
        "generalisation_gap": gap,
        "update_smoothness": observer.smoothness(),
        "parameters.factors": counts.factors,
        "parameters.transfer": counts.transfer,
        "parameters.head": counts.head,
        "parameters.trainable": counts.trainable,
        "adapter.bytes": size,
        "memory.peak_bytes": costs["memory.peak_bytes"],
        "tokens_per_second": sum_over_group(costs["tokens_per_second"]),
        "seconds.train": training_seconds,
        "seconds.eval": evaluated - trained,
        "seconds.observe": observing,
    }
    return RunResult(
        status="diverged" if watch.diverged else "finished",
        headline=task.headline,
        metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        curves=curves,
        modules=modules,
        phi=phi,
        snapshots=observer.snapshots,
        landscape=slice_of_loss,
        warnings=[
            *_left_out(len(train) - len(examples), len(train)),
            *observer.warnings(modules, config.adapter),
        ],
        data={
            "fingerprint": data.fingerprint(),
            "train_rows": len(examples),
            "eval_rows": len(held_out),
            **data.about,
            **({"backbone": backbone.note} if backbone.note else {}),
        },
        environment={**environment(), **task.notes},
        accumulate=accumulate,
    )


def _in_group(
    config: dict[str, Any], data_dir: Path | None, save_to: Path | None, accumulate: int, report: Callable[[Any], None]
) -> RunResult:
    """The run in one of several processes; process 0 reports the steps."""
    chosen, on_step = RunConfig.from_mapping(config), lambda *step: report(step)
    return run(chosen, data_dir=data_dir, on_step=on_step, save_to=save_to, accumulate=accumulate)


def load_data(config: RunConfig, data_dir: Path | None = None) -> TaskData:
    """All rows of the task, read once for as long as its files do not change. Raises InputError."""
    return _load(config.task, config.data, data_dir, tasks.stamp(config.task, config.data))


@functools.lru_cache(maxsize=2)
def _load(task: str, settings: DataSettings, data_dir: Path | None, stamp: tuple[tuple[int, ...], ...]) -> TaskData:
    loader = tasks.find(task, settings)
    loader.check(data_dir)
    return loader.load(data_dir)


def _longest_first(rows: Rows, examples: Sequence[Example]) -> tuple[Rows, Sequence[Example]]:
    """Rows and their examples by length, so that a batch is hardly padded; as they are where they have no length."""
    if not isinstance(examples, list) or "input_ids" not in examples[0]:
        return rows, examples
    order = sorted(range(len(rows)), key=lambda i: -len(examples[i]["input_ids"]))
    return rows.take(order), [examples[i] for i in order]


def _left_out(count: int, rows: int) -> list[str]:
    """What the user is told of training rows that were too long."""
    reason = "have more tokens than train.max_length or the backbone allows, and were left out."
    return [f"{count} of {rows} training rows {reason}"] if count else []


def _spread(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spread."""
    count = min(count, len(rows))
    return rows.take(range(0, len(rows) // count * count, len(rows) // count))


def _trainer_for(task: Task) -> type[Trainer]:
    """transformers' Trainer: its loss is the whole batch's, however that is divided; the task scores the answers."""
    import transformers

    class TaskTrainer(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
        ) -> Any:
            rows = len(inputs["labels"])
            if inputs["labels"].dim() > 1:  # of tokens, all of which the Trainer counts: those of the whole batch
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            # It counts rows too, but most models give the mean over the rows that they see, whatever they are told.
            outputs = model(**inputs)
            whole = sum_over_group(rows) if num_items_in_batch is None else num_items_in_batch
            loss = outputs["loss"] * (rows * world_size() / whole)
            return (loss, outputs) if return_outputs else loss

        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, scores = task.score(model, inputs)
            # The labels are with the rows; the Trainer computes metrics only where it gets some.
            return loss, *((None, None) if prediction_loss_only else (scores, scores.new_zeros(len(scores))))

    return TaskTrainer


def _arguments(config: RunConfig, rows: int, headline: str, folder: Path, accumulate: int) -> TrainingArguments:
    from transformers import TrainingArguments

    train = config.train
    steps = train.max_steps or math.ceil(rows / train.batch_size) * train.epochs
    every: dict[str, Any] = {"save_strategy": "no"}
    if train.eval_steps is not None:
        every = {
            "eval_strategy": "steps",
            "eval_steps": train.eval_steps,
            "save_strategy": "steps",
            "save_steps": train.eval_steps,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": headline,
            "greater_is_better": True,
        }
    if train.gradient_checkpointing:  # called so in earlier releases; the reentrant form needs inputs with gradients
        recent = hasattr(TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if recent else "gradient_checkpointing"
        every |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size // accumulate // train.processes,
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=EVAL_BATCH,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_ratio,  # below 1 it is a share of the steps
        max_grad_norm=train.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        seed=config.seed,
        logging_steps=max(1, int(steps // CURVE_POINTS)),
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        **every,
    )


def _optimizer(model: PreTrainedModel | PeftModel, config: RunConfig) -> torch.optim.Optimizer | None:
    """AdamW with three groups: A, B and the head; α with its own rate and decay; ω and learned grid points.

    None where nothing trains.
    """
    train, settings = config.train, config.adapter
    groups: list[dict[str, Any]] = [{"params": [], "lr": train.lr, "weight_decay": train.weight_decay}]
    if isinstance(settings, PhiSettings):
        assert settings.transfer_lr is not None
        rate = train.lr * settings.transfer_lr
        groups.append({"params": [], "lr": rate, "weight_decay": settings.transfer_decay})
        groups.append({"params": [], "lr": rate, "weight_decay": 0.0})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = 0 if ".phi_bank." not in name else 1 if name.endswith(".alpha") else 2
            groups[group]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999)) if groups else None


def _watch(
    look: Callable[[int, int], None], on_step: Callable[[int, int], None] | None, after_step: Callable[[int, int], None]
) -> Any:
    """A callback for each step: to the method, to `look` and to the user; ends a run of no longer finite loss."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        diverged = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(0, state.max_steps)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after_step(state.global_step + 1, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(state.global_step, state.max_steps)
            if on_step is not None:
                on_step(state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                self.diverged = control.should_training_stop = True

    return Watch()


def _early_stopping(patience: int | None) -> list[TrainerCallback]:
    from transformers import EarlyStoppingCallback

    return [] if patience is None else [EarlyStoppingCallback(patience)]


def _curves(history: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    skipped = ("runtime", "per_second", "model_preparation_time")
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            wanted = name == "loss" or (name.startswith("eval_") and not name.endswith(skipped))
            if wanted and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), float(value)))
    return curves


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
