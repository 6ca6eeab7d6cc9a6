"""transformers' Trainer in a process of a group, with the batches, losses and metrics of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from basisadapt.training.distributed.group import in_group

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer
    from transformers.trainer_utils import EvalLoopOutput


def distributed_trainer(trainer: type[Trainer], in_step: bool) -> type[Trainer]:
    """A subclass of `trainer` for a process of the group; `trainer` itself outside a group.

    A training batch has the same rows as in one process, and is divided. In evaluation, every process takes a share of
    the batches, and all get all answers; with `in_step`, as shards require, every process takes all batches. Dropout
    draws differ.
    """
    if not in_group():
        return trainer
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import BatchSampler, DataLoader
    from transformers.trainer_pt_utils import EvalLoopContainer
    from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

    class SpreadTrainer(trainer):  # type: ignore[misc]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() > 0:
                torch.manual_seed(self.args.seed + dist.get_rank())
            return super().train(*args, **kwargs)

        def get_train_dataloader(self) -> DataLoader[Any]:
            # accelerate would fill the last batch of an epoch with repeated rows.
            order = SeedableRandomSampler(self.train_dataset, generator=torch.Generator(), data_seed=self.args.seed)
            rows = self.args.per_device_train_batch_size * dist.get_world_size()
            return DataLoader(
                self.train_dataset,
                batch_sampler=_Shares(BatchSampler(order, rows, drop_last=False)),
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )

        def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
            examples = self.eval_dataset if eval_dataset is None else eval_dataset
            return DataLoader(examples, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

        def evaluation_loop(
            self,
            dataloader: DataLoader[Any],
            description: str,
            prediction_loss_only: bool | None = None,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "eval",
        ) -> EvalLoopOutput:
            if self.model_wrapped is self.model:  # without training, the model has no autocast yet
                self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.model.eval()
            examples: Any = dataloader.dataset
            size = self.args.per_device_eval_batch_size
            batches = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
            found = _predicted(self, examples, batches, in_step)
            answers = EvalLoopContainer(do_nested_concat=True, padding_index=-100)
            for index in range(len(batches)):
                answers.add(found[index][1])
            predictions, labels = answers.get_arrays(), torch.zeros(len(examples)).numpy()
            metrics = {} if self.compute_metrics is None else self.compute_metrics(EvalPrediction(predictions, labels))
            metrics["loss"] = sum(found[i][0] * len(rows) for i, rows in enumerate(batches)) / len(examples)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            return EvalLoopOutput(predictions, labels, metrics, len(examples))

    return SpreadTrainer


def _predicted(trainer: Any, examples: Any, batches: Sequence[range], in_step: bool) -> dict[int, tuple[float, Any]]:
    """The loss and the scores of every batch, by its index; the processes divide the batches unless `in_step`."""
    found = {}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        if in_step:  # all processes must draw the same samples
            torch.manual_seed(trainer.args.seed)
        for index in range(len(batches))[slice(None) if in_step else _mine()]:
            batch = trainer.data_collator([examples[row] for row in batches[index]])
            loss, scores, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
            found[index] = loss.item(), scores.cpu()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    for others in everywhere:
        found.update(others)
    return found


def _mine() -> slice:
    """This process's share of a sequence."""
    return slice(dist.get_rank(), None, dist.get_world_size())


class _Shares:
    """This process's share of every batch; each process takes a whole batch that has fewer rows than processes."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch if len(batch) < dist.get_world_size() else batch[_mine()]

    def __len__(self) -> int:
        return len(self._batches)
