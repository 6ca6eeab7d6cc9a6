"""One run, top to bottom: a frozen RunConfig in, a plain RunResult out. Knows neither Optuna nor MLflow."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from basisadapt import backbones
from basisadapt.diagnostics.spectrum import dc_share, stable_rank
from basisadapt.environment import environment
from basisadapt.errors import InputError
from basisadapt.methods import METHODS
from basisadapt.phi.settings import LowRankSettings, PhiSettings
from basisadapt.run_config import RunConfig
from basisadapt.tasks import TASKS, Rows, TaskData

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

ADAPTER = "default"
CURVE_POINTS = 100  # loss values kept per run
EVAL_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """What a run would be, from shapes alone: nothing is trained and no weight is loaded.

    factors: parameters in A and B; transfer: in φ (α, ω, learned x); head: the task's head; modules: adapted modules;
    total: parameters of the whole model, adapter included.
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
    main metric, such as "accuracy". metrics: final numbers (finite ones only): the task's metrics, "eval_loss",
    "train_loss", "stable_rank.mean" and ".std" over modules, "dc_share.mean", "parameters.trainable", ".factors",
    ".transfer" and ".head", "seconds.train" and ".eval". curves: name -> [(step, value), ...]: "loss", and
    "eval_loss" and the task's metrics where the run evaluates on its way. modules: adapted module ->
    {"stable_rank", "dc_share", "kind"}. phi: adapted module -> {"z": [..], "phi": [..]}, what φ adds to BA, f(z), on
    the range of BA (empty for methods without φ). warnings: sentences for the user. data: fingerprint and row counts.
    environment: versions, git commit, platform, threads.
    """

    status: str
    headline: str
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    phi: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def plan(config: RunConfig, data_dir: Path | None = None) -> Plan:
    """Check `config` against the data's place and the model's shapes, and count. Raises InputError."""
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("train.precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    task = TASKS[config.task]()
    task.check(data_dir)
    backbone = backbones.find(config.backbone)
    backbones.location(backbone)
    return count_parameters(attach(backbones.shape_only(backbone, task.num_labels), config))


def attach(model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """The model with the configured adapter in it. Raises InputError if no module matches or r is too large."""
    import peft

    settings = config.adapter
    if isinstance(settings, PhiSettings) and settings.grid_seed is None:
        settings = dataclasses.replace(settings, grid_seed=config.seed)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for this under a name that transformers is about to drop.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            names = [name for name, _ in model.named_modules()]
            adapted = peft.get_peft_model(model, METHODS[config.method].peft_config(settings, "SEQ_CLS", names))
    except InputError:
        raise
    except ValueError as error:  # peft's answer to target modules that match nothing
        wanted = settings.target_modules
        raise InputError(f"adapter.target_modules: {wanted} matches no module of {config.backbone!r}") from error
    for name, layer in adapted_layers(adapted):
        smaller = min(layer.in_features, layer.out_features)
        if settings.r > smaller:
            raise InputError(f"adapter.r must be at most {smaller}, the smaller side of {name!r}, got {settings.r}")
    return adapted


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Name in the base model and layer of every adapted module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def count_parameters(model: PeftModel) -> Plan:
    """The counts, from the model itself."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if ".modules_to_save." in name)
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
) -> RunResult:
    """Train and evaluate. `on_step(step, total)` is called after each step; `save_to` receives the adapter.

    Raises InputError for what plan() would have refused; a loss that is not finite is a result, status "diverged".
    """
    import transformers

    task = TASKS[config.task]()
    data = _load(config.task, data_dir)
    train, held_out = data.train.head(config.train.train_rows), data.eval.head(config.train.eval_rows)
    transformers.set_seed(config.seed)
    base, tokenizer = backbones.load(backbones.find(config.backbone), task.num_labels)
    model = attach(base, config)
    start = _factors(model)
    watch = _watch(on_step)

    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = transformers.Trainer(
            model=model,
            args=_arguments(config, len(train), task.headline, Path(checkpoints)),
            train_dataset=_tokenised(train, tokenizer, config.train.max_length),
            eval_dataset=_tokenised(held_out, tokenizer, config.train.max_length),
            processing_class=tokenizer,
            compute_metrics=lambda output: task.metrics(output.predictions, output.label_ids),
            optimizers=(_optimizer(model, config), None),
            callbacks=[watch, *_early_stopping(config.train.patience)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        began = time.perf_counter()
        training_loss = trainer.train().training_loss
        trained = time.perf_counter()
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        evaluated = time.perf_counter()
    if save_to is not None:
        model.save_pretrained(save_to)

    scores = {} if watch.diverged else task.metrics(output.predictions, output.label_ids)
    counts = count_parameters(model)
    modules = _describe_updates(model)
    metrics = {
        **scores,
        "eval_loss": output.metrics["eval_loss"],
        "train_loss": training_loss,
        "stable_rank.mean": statistics.fmean(m["stable_rank"] for m in modules.values()),
        "stable_rank.std": statistics.pstdev(m["stable_rank"] for m in modules.values()),
        "dc_share.mean": statistics.fmean(m["dc_share"] for m in modules.values()),
        "parameters.factors": counts.factors,
        "parameters.transfer": counts.transfer,
        "parameters.head": counts.head,
        "parameters.trainable": counts.trainable,
        "seconds.train": trained - began,
        "seconds.eval": evaluated - trained,
    }
    return RunResult(
        status="diverged" if watch.diverged else "finished",
        headline=task.headline,
        metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        curves=_curves(trainer.state.log_history),
        modules=modules,
        phi=_learned_phi(model),
        warnings=_collapse_warnings(model, config.adapter, start, modules),
        data={"fingerprint": data.fingerprint(), "train_rows": len(train), "eval_rows": len(held_out)},
        environment=environment(),
    )


@functools.lru_cache(maxsize=2)
def _load(task: str, data_dir: Path | None) -> TaskData:
    loader = TASKS[task]()
    loader.check(data_dir)
    return loader.load(data_dir)


def _tokenised(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    from datasets import Dataset

    encoded = tokenizer(rows.first, rows.second, truncation=True, max_length=max_length)
    return Dataset.from_dict({**encoded, "labels": rows.labels})


def _arguments(config: RunConfig, rows: int, headline: str, folder: Path) -> TrainingArguments:
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
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=EVAL_BATCH,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_ratio,  # below 1 it is a share of the steps
        max_grad_norm=train.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        seed=config.seed,
        logging_steps=max(1, int(steps // CURVE_POINTS)),
        logging_nan_inf_filter=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        **every,
    )


def _optimizer(model: PeftModel, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with three groups: A, B and the head; α with its own rate and decay; ω and learned grid points."""
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
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.999))


def _watch(on_step: Callable[[int, int], None] | None) -> Any:
    """A callback that reports each step and ends a run whose loss is no longer finite."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        diverged = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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


@torch.no_grad()
def _describe_updates(model: PeftModel) -> dict[str, dict[str, Any]]:
    from basisadapt.adapter.placement import describe

    described = {}
    for name, layer in adapted_layers(model):
        delta = torch.nan_to_num(layer.get_delta_weight(ADAPTER), posinf=0.0, neginf=0.0)
        kind = describe(name).kind
        described[name] = {"stable_rank": stable_rank(delta), "dc_share": dc_share(delta), "kind": kind}
    return described


@torch.no_grad()
def _learned_phi(model: PeftModel, points: int = 65) -> dict[str, dict[str, list[float]]]:
    from basisadapt.adapter import PhiLinear

    curves = {}
    for name, layer in adapted_layers(model):
        if isinstance(layer, PhiLinear) and ADAPTER in layer.phi_source:
            radius = float((layer.phi_B[ADAPTER] @ layer.phi_A[ADAPTER]).abs().max())
            if math.isfinite(radius):
                transfer = layer.phi_source[ADAPTER].bank.transfer(layer.name).double()
                transfer = dataclasses.replace(transfer, path=False, scaling=1.0)
                z = torch.linspace(-radius, radius, points, dtype=torch.float64, device=transfer.alpha.device)
                curves[name] = {"z": z.tolist(), "phi": transfer(z).tolist()}
    return curves


def _factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of A and B of every adapted module."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".phi_bank." not in name and ".modules_to_save." not in name
    }


def _collapse_warnings(
    model: PeftModel, settings: LowRankSettings, start: dict[str, torch.Tensor], modules: dict[str, dict[str, Any]]
) -> list[str]:
    """Whether the adapter is a low-rank update in name only, and why."""
    moved = dict.fromkeys(modules, 0.0)
    for name, before in start.items():
        module = next(module for module in modules if f".{module}." in name)
        moved[module] = max(moved[module], (model.get_parameter(name) - before).norm().item())
    # B starts at zero: what it moved is measured against A.
    scale = max(before.norm().item() for before in start.values())
    unmoved = sum(distance < 1e-3 * scale for distance in moved.values())
    constant = sum(m["stable_rank"] < 1.05 and m["dc_share"] > 0.9 for m in modules.values())

    literal = (
        isinstance(settings, PhiSettings)
        and settings.amplitude_init == "zero"
        and not (settings.identity_path or settings.centre)
    )
    cause = (
        "A dead start: with alpha = 0 and no identity path, phi stays even on a symmetric grid, so phi'(0) = 0 and, "
        "with B = 0, A and B get no gradient; preset=residual has none."
        if literal
        else "phi(0), the same on every weight, outweighs the rest; centre=true takes it out."
    )
    warnings = []
    if constant > len(modules) / 2:
        warnings.append(f"collapsed: most updates are one constant (stable rank 1, DC share above 0.9). {cause}")
    if unmoved > len(modules) / 2:
        warnings.append("collapsed: A and B of most modules did not move.")
    return warnings
