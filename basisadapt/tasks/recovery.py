"""4-bit recovery: how much of what rounding takes from a model can an adapter bring back?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import default_data_collator

from basisadapt.tasks.docstrings import Docstrings
from basisadapt.tasks.task import Example, Rows, Task, TaskData

RAGGED = ("input_ids", "targets")  # of an example: as long as its text


class RecoveryTask(Task):
    """Train an adapter so that a frozen model, rounded to 4 bits, gives again what it gave before, on real texts.

    The linear layers of the blocks are rounded to NF4, 64 weights to a scale. The texts are those of `docstrings`, one
    in five held out, cut at train.max_length; the loss is the mean divergence of the rows. Of each number of a row
    below, x, the share that is recovered is (x_rounded − x) / (x_rounded − x_before), all three means over the
    held-out rows: 0 for no adapter, 1 for the model of before. Sources: Li et al. (2024), LoftQ; Dettmers et al.
    (2023), QLoRA.
    """

    headline, num_labels, max_length = "recovered", 1, 64
    numbers: tuple[str, ...]  # what `RoundedModel.compare` gives

    def check(self, data_dir: Path | None) -> None:
        """Nothing to check: Python includes the texts."""

    def load(self, data_dir: Path | None) -> TaskData:
        """The texts, in the order and the parts of `docstrings`."""
        data = Docstrings(self.settings).load(data_dir)
        train, held_out = (Rows(rows.inputs, [0] * len(rows)) for rows in (data.train, data.eval))
        return TaskData(train, held_out)

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """Token ids and the hidden states of before; to evaluate, also the numbers after and before rounding."""
        ids = processor.tokenizer(list(rows.inputs), truncation=True, max_length=max_length)["input_ids"]
        examples = [
            {"input_ids": torch.tensor(one), "targets": target, "numbers": numbers, "labels": 0}
            for one, target, numbers in zip(ids, *processor(ids), strict=True)
        ]
        return [{k: v for k, v in one.items() if k != "numbers"} for one in examples] if training else examples

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """Pads texts and hidden states at the end, to the longest row of the batch."""

        def collate(examples: list[Example]) -> dict[str, Tensor]:
            ragged = {name: [example[name] for example in examples] for name in RAGGED}
            mask = pad_sequence([torch.ones_like(ids) for ids in ragged["input_ids"]], batch_first=True)
            padded = {name: pad_sequence(column, batch_first=True) for name, column in ragged.items()}
            rest: list[Example] = [{k: v for k, v in one.items() if k not in RAGGED} for one in examples]
            return {**padded, "attention_mask": mask, **default_data_collator(rest)}

        return collate

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean divergence, and the numbers with the adapter, after and before rounding, (rows, 3, numbers)."""
        output = model(**{name: value for name, value in batch.items() if name != "numbers"})
        return output.loss, torch.cat([output.logits[:, None], batch["numbers"]], dim=1)

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """For each number the share recovered, and its three means; scores: those of `score`."""
        metrics: dict[str, float] = {}
        for name, (found, rounded, before) in zip(self.numbers, scores.mean(axis=0, dtype=np.float64).T, strict=True):
            share = "recovered" if name == self.numbers[0] else f"recovered.{name}"
            metrics |= {share: (rounded - found) / (rounded - before)}
            metrics |= {name: found, f"{name}.rounded": rounded, f"{name}.before": before}
        return {name: float(value) for name, value in metrics.items()}


class RecoveredStates(RecoveryTask, name="recovery/states"):
    """Of an encoder, BERT: the last hidden states of its tokens.

    "divergence" is Σ‖h − h*‖² / Σ‖h*‖² of a text, h* the states before rounding.
    """

    form, numbers = "rounded_encoder", ("divergence",)


class RecoveredText(RecoveryTask, name="recovery/text"):
    """Of a language model, Llama or Qwen2: its distributions of the next token.

    "divergence" is KL(p* ‖ p), p* the distribution before rounding, and "text_loss" −log p of the text's next token,
    means over the tokens of a text, in nats. Training lowers the divergence and never sees that the text is right.
    """

    form, numbers = "rounded_language_model", ("divergence", "text_loss")
