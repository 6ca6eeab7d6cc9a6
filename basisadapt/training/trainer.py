"""transformers' Trainer for a run: its settings, the optimizer, and callbacks between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from basisadapt.methods import ParameterGroup
from basisadapt.tasks import Task
from basisadapt.tasks.completion import IGNORED, batch_loss
from basisadapt.training.config import RunConfig, TrainSettings
from basisadapt.training.distributed.group import lowest_in_group, sum_over_group, world_size
from basisadapt.training.observation import CURVE_POINTS

EVAL_BATCH = 64


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set the arithmetic of a run on a GPU: matrix products in TF32 for precision "tf32", and attention without cuDNN.

    cuDNN's gradients of masked attention are wrong at some lengths (pytorch issue 196678).
    """
    products, attention = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else products)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cuda.enable_cudnn_sdp(attention)


def trainer_for(task: Task) -> type[transformers.Trainer]:
    """A subclass of transformers' Trainer for the task.

    Its loss is that of the whole batch, however the batch is divided among processes and accumulation steps. The task
    scores the answers.
    """
    from torch.utils.data import SequentialSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class TaskTrainer(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(train_dataset)
            if not isinstance(sampler, LengthGroupedSampler):
                return sampler
            # transformers' own order goes from long to short again and again; here the batches are shuffled.
            return MixedBatches(sampler, self.args.train_batch_size * self.args.gradient_accumulation_steps)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            # transformers would group these by length too, and the answers would belong to other rows.
            return SequentialSampler(eval_dataset)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
        ) -> Any:
            labels = inputs["labels"]
            if labels.dim() == 1:  # one label per row; most models return the mean over the rows that they see
                outputs, rows = model(**inputs), len(labels)
                whole: Any = sum_over_group(rows) if num_items_in_batch is None else num_items_in_batch
                loss = outputs["loss"] * (rows * world_size() / whole)
            else:  # one label per token
                outputs, loss = batch_loss(model, inputs)
                own = int((labels != IGNORED).sum()) if num_items_in_batch is None else 0
                whole = sum_over_group(own) if num_items_in_batch is None else num_items_in_batch
                loss = loss * (world_size() / whole)
            return (loss, outputs) if return_outputs else loss

        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, scores = task.score(model, inputs)
            # The rows hold the labels; zeros stand for them here, as the Trainer computes no metrics without any.
            return loss, *((None, None) if prediction_loss_only else (scores, scores.new_zeros(len(scores))))

    return TaskTrainer


class MixedBatches:
    """A sampler's batches of `size` rows, reshuffled for every epoch; an incomplete batch stays last."""

    def __init__(self, sampler: Any, size: int) -> None:
        self._sampler, self._size = sampler, size

    def __iter__(self) -> Iterator[int]:
        rows = torch.tensor(list(self._sampler))
        full = rows[: len(rows) // self._size * self._size].view(-1, self._size)
        yield from torch.cat([full[torch.randperm(len(full))].flatten(), rows[full.numel() :]]).tolist()

    def __len__(self) -> int:
        return len(self._sampler)


def trainer_arguments(
    config: RunConfig, rows: int, headline: str, folder: Path, accumulate: int
) -> transformers.TrainingArguments:
    """The Trainer's settings.

    - `rows`: the number of training rows.
    - `headline`: the metric that selects the best checkpoint.
    - `folder`: for checkpoints.
    - `accumulate`: the number of smaller batches that make up a batch.
    """
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
    if train.gradient_checkpointing:  # its name in earlier releases; the reentrant form needs inputs with gradients
        recent = hasattr(transformers.TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if recent else "gradient_checkpointing"
        every |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    if train.group_by_length:
        every["train_sampling_strategy"] = "group_by_length"
    return transformers.TrainingArguments(
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


def make_optimizer(
    model: PreTrainedModel | PeftModel, groups: Sequence[ParameterGroup], train: TrainSettings
) -> torch.optim.Optimizer | None:
    """AdamW with the method's groups at their own rates and decays, and all other parameters at the run's.

    None if nothing trains.
    """
    apart = {id(parameter) for group in groups for parameter in group.parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    chosen = [
        {"params": list(group.parameters), "lr": group.lr, "weight_decay": group.weight_decay}
        for group in (ParameterGroup(others, train.lr, train.weight_decay), *groups)
        if group.parameters
    ]
    return torch.optim.AdamW(chosen, betas=(0.9, 0.999)) if chosen else None


OnStep = Callable[[int, int], None]  # called with the number of a step and the number of all steps


def make_watch(look: OnStep, on_step: OnStep | None, before: OnStep, after: OnStep) -> Any:
    """A Trainer callback that calls the four functions at every step, each with the step and the number of steps.

    - `look`: at the start, as step 0, and at the end of every step.
    - `on_step`: at the end of every step, for the user; or None.
    - `before`, `after`: before and after the optimizer's update.

    It ends a run whose loss or gradient is not finite; its `reason` is then a sentence that names the step, else empty.
    """

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        reason = ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._gradients = _Gradients()
            look(0, state.max_steps)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if not args.fp16:  # its scaler finds the scale by gradients that are not finite, and skips those steps
                self._gradients.look(model, state.global_step + 1)
            before(state.global_step + 1, state.max_steps)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after(state.global_step + 1, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(state.global_step, state.max_steps)
            if on_step is not None:
                on_step(state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                self._end("loss", state.global_step, control)
            step = self._gradients.first()
            if step is not None:
                self._end("gradient", step, control)

        def _end(self, what: str, step: int, control: Any) -> None:
            self.reason = f"diverged: the {what} was not finite at step {step}, and the run ended"
            control.should_training_stop = True

    return Watch()


class _Gradients:
    """Checks the gradients of every step on their device, without waiting for a GPU until `first` is called."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first step whose gradient was not finite

    def look(self, model: nn.Module, step: int) -> None:
        """Check the gradients of step number `step`."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([getattr(g, "_local_tensor", g) for g in gradients])
        found = torch.where(norm.isfinite(), math.inf, float(step))
        self._first = found if self._first is None else torch.minimum(self._first, found)

    def first(self) -> int | None:
        """The first step whose gradient was not finite in any process of the group, or None."""
        mine = math.inf if self._first is None else self._first.item()
        first = lowest_in_group(mine)
        return int(first) if math.isfinite(first) else None


def logged_curves(history: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """The finite values that the Trainer has logged, name to [(step, value), ...]: the loss and the evaluations."""
    skipped = ("runtime", "per_second", "model_preparation_time")
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            wanted = name == "loss" or (name.startswith("eval_") and not name.endswith(skipped))
            if wanted and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), float(value)))
    return curves
