"""Text classification and regression: a text, or a pair of texts, and a label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from basisadapt.tasks.task import Example, Rows, Task


class TextTask(Task):
    """Inputs are texts or pairs of texts; labels are class indices, or numbers for a regression (num_labels = 1)."""

    form = "text"
    max_length = 32

    @abstractmethod
    def metrics(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics of the model's `scores`, shape (rows, num_labels), against `labels`, shape (rows,)."""

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """Token ids, truncated to max_length, and the labels."""
        pairs = len(rows) > 0 and not isinstance(rows.inputs[0], str)
        texts = [list(column) for column in zip(*rows.inputs, strict=True)] if pairs else [list(rows.inputs)]
        encoded = processor(*texts, truncation=True, max_length=max_length)
        columns = {**encoded, "labels": list(rows.labels)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """Pads token ids to the longest row of the batch, shape (rows, length)."""
        from transformers import DataCollatorWithPadding

        return cast(Callable[[list[Example]], dict[str, Tensor]], DataCollatorWithPadding(processor))

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The task's `metrics` of scores (rows, num_labels) against the labels of `rows`."""
        return self.metrics(scores, np.asarray(rows.labels))
