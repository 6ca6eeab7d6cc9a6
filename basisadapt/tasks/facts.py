"""Random facts: how many bits can an adapter store?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basisadapt.tasks.drawn import DrawnTask
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.task import Example, Rows

KEY = 4  # tokens of a key
CLASSES = 256
WORDS = 2**31  # a token is given by a number below, see `backbones.parts.Below`


class Facts(DrawnTask, name="facts"):
    """data.facts keys of four random words, and for each one of 256 classes, drawn alike.

    What a fact holds cannot be derived from others: it is stored or not. Metrics: "bits", those that the model has
    stored, facts · (log₂ 256 − H) with its mean cross-entropy H in bits; "recall", the share of keys whose class it
    finds likeliest. The model is the backbone's last feed-forward block, read at the first token through a frozen
    random classifier; what lies below it is computed once. Source of the measure: Morris et al. (2025), How Much Do
    Language Models Memorize?
    """

    form, headline, num_labels = "feed_forward", "bits", CLASSES

    def __init__(self, settings: DataSettings | None = None) -> None:
        super().__init__(settings)
        self._known: dict[tuple[int, ...], Tensor] = {}

    @property
    def drawn_as(self) -> str:
        """Their number."""
        return f"{self.settings.facts} facts: keys of {KEY} words, {CLASSES} classes"

    def draw(self, generator: np.random.Generator) -> Rows:
        """Keys, as numbers of tokens, and classes."""
        keys = generator.integers(WORDS, size=(self.settings.facts, KEY))
        return Rows(keys.tolist(), generator.integers(CLASSES, size=self.settings.facts).tolist())

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """The hidden states of the keys, shape (hidden,) each; a key that is asked for again is not computed again."""
        keys = [tuple(key) for key in rows.inputs]
        if new := [key for key in dict.fromkeys(keys) if key not in self._known]:
            self._known.update(zip(new, processor(new), strict=True))
        return [{"hidden": self._known[key], "labels": label} for key, label in zip(keys, rows.labels, strict=True)]

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """Stacks."""
        return _stacked

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The cross-entropy and the logits."""
        output = model(**batch)
        return output.loss, output.logits

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """Bits and recall."""
        labels = torch.tensor(rows.labels)
        logits = torch.from_numpy(scores).double()
        entropy = torch.nn.functional.cross_entropy(logits, labels).item() / math.log(2)
        recall = (logits.argmax(dim=1) == labels).double().mean().item()
        return {"bits": len(rows) * (math.log2(CLASSES) - entropy), "recall": recall}


def _stacked(examples: list[Example]) -> dict[str, Tensor]:
    return {
        "hidden": torch.stack([example["hidden"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
