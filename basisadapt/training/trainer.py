"""How a run trains: transformers' Trainer, its settings, the optimiser, and what is done between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from basisadapt.methods import ParameterGroup
from basisadapt.tasks import Task
from basisadapt.tasks.completion import IGNORED, batch_loss
from basisadapt.training.config import RunConfig, TrainSettings
from basisadapt.training.distributed.group import lowest_in_group, sum_over_group, world_size
from basisadapt.training.observation import CURVE_POINTS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

EVAL_BATCH = 64


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """How a run computes on a GPU: its products in TF32 where that is its precision, its attention without cuDNN's.

    cuDNN's gradients of masked attention are wrong at some lengths (pytorch issue 196678).
    """
    products, attention = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.set_float32_matmul_precision("high" if precision == "tf32" else products)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cuda.enable_cudnn_sdp(attention)


def trainer_for(task: Task) -> type[Trainer]:
    """transformers' Trainer: its loss is the whole batch's, however that is divided; the task scores the answers."""
    import transformers
    from torch.utils.data import SequentialSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class TaskTrainer(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(train_dataset)
            if not isinstance(sampler, LengthGroupedSampler):
                return sampler
            # transformers' own goes from long to short over and over; here the batches come in any order.
            return MixedBatches(sampler, self.args.train_batch_size * self.args.gradient_accumulation_steps)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            # transformers groups these by length as well, and the answers would be those to other rows.
            return SequentialSampler(eval_dataset)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
        ) -> Any:
            labels = inputs["labels"]
            if labels.dim() == 1:  # it counts rows too, but most models give the mean over the rows that they see
                outputs, rows = model(**inputs), len(labels)
                whole: Any = sum_over_group(rows) if num_items_in_batch is None else num_items_in_batch
                loss = outputs["loss"] * (rows * world_size() / whole)
            else:  # of tokens
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
            # The labels are with the rows; the Trainer computes metrics only where it gets some.
            return loss, *((None, None) if prediction_loss_only else (scores, scores.new_zeros(len(scores))))

    return TaskTrainer


class MixedBatches:
    """A sampler's batches of `size` rows in an order drawn for every epoch; one that is not full stays the last."""

    def __init__(self, sampler: Any, size: int) -> None:
        self._sampler, self._size = sampler, size

    def __iter__(self) -> Iterator[int]:
        rows = torch.tensor(list(self._sampler))
        full = rows[: len(rows) // self._size * self._size].view(-1, self._size)
        yield from torch.cat([full[torch.randperm(len(full))].flatten(), rows[full.numel() :]]).tolist()

    def __len__(self) -> int:
        return len(self._sampler)


def trainer_arguments(config: RunConfig, rows: int, headline: str, folder: Path, accumulate: int) -> TrainingArguments:
    """The Trainer's settings. rows: to train on; headline: the metric that the best checkpoint is the best in."""
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
    if train.group_by_length:
        every["train_sampling_strategy"] = "group_by_length"
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


def make_optimizer(
    model: PreTrainedModel | PeftModel, groups: Sequence[ParameterGroup], train: TrainSettings
) -> torch.optim.Optimizer | None:
    """AdamW: the method's groups at rates and decays of their own, and all else that trains at the run's.

    None where nothing trains.
    """
    apart = {id(parameter) for group in groups for parameter in group.parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    chosen = [
        {"params": list(group.parameters), "lr": group.lr, "weight_decay": group.weight_decay}
        for group in (ParameterGroup(others, train.lr, train.weight_decay), *groups)
        if group.parameters
    ]
    return torch.optim.AdamW(chosen, betas=(0.9, 0.999)) if chosen else None


OnStep = Callable[[int, int], None]  # takes the number of a step and how many there are


def make_watch(look: OnStep, on_step: OnStep | None, before: OnStep, after: OnStep) -> Any:
    """A callback for each step: `before` and `after` its update to the method, to `look` and to the user.

    Ends a run whose loss or gradient is no longer finite, and then has the `reason`, a sentence that names the step.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        reason = ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._gradients = _Gradients()
            look(0, state.max_steps)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if not args.fp16:  # whose scaler finds its scale by gradients that are not finite, and skips their steps
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
    """Looks at the gradients of every step, and only tells when asked, so that a GPU need not be waited for."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first step whose gradient was not finite

    def look(self, model: nn.Module, step: int) -> None:
        """Look at the gradients that step number `step` is made with."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([getattr(g, "_local_tensor", g) for g in gradients])
        found = torch.where(norm.isfinite(), math.inf, float(step))
        self._first = found if self._first is None else torch.minimum(self._first, found)

    def first(self) -> int | None:
        """The first step whose gradient was not finite, of all processes of the group."""
        mine = math.inf if self._first is None else self._first.item()
        first = lowest_in_group(mine)
        return int(first) if math.isfinite(first) else None


def early_stopping(patience: int | None) -> list[TrainerCallback]:
    """What ends a run after so many evaluations without a better one; nothing for None."""
    from transformers import EarlyStoppingCallback

    return [] if patience is None else [EarlyStoppingCallback(patience)]


def logged_curves(history: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """What the Trainer has logged, name -> [(step, value), ...]: the loss, and the evaluations on the way."""
    skipped = ("runtime", "per_second", "model_preparation_time")
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            wanted = name == "loss" or (name.startswith("eval_") and not name.endswith(skipped))
            if wanted and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), float(value)))
    return curves
