"""An MLP with random weights, of any depth, and the random vectors that are its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RandomMLPConfig(PretrainedConfig):  # type: ignore[misc]
    """The shapes of a `RandomMLP`.

    - `hidden_size` (int ≥ 1): the width of every layer.
    - `num_hidden_layers` (int ≥ 1): the number of layers.
    """

    model_type = "random_mlp"

    hidden_size: int = 128
    num_hidden_layers: int = 1


AutoConfig.register(RandomMLPConfig.model_type, RandomMLPConfig, exist_ok=True)


class RandomMLP(PreTrainedModel):  # type: ignore[misc]
    """Logits C y, shape (rows, num_labels), with y = W_D relu(W_{D−1} ... relu(W₁ x)), D layers of one width.

    - x: (rows, width), from `RandomVectors`.
    - Wᵢ (width, width): drawn from N(0, 2 / width), which keeps the scale of x through the layers. Source: He et al.
      (2015).
    - C: `classes`, (num_labels, width), drawn from N(0, 1 / width²), so that all classes are nearly alike at the start
      and there is nothing to unlearn; a buffer, which no method trains and no adapter saves.

    All are drawn from torch's global generator.
    """

    config_class = RandomMLPConfig
    main_input_name = "hidden"

    def __init__(self, config: RandomMLPConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        layers = [nn.ModuleDict({"fc1": nn.Linear(width, width, bias=False)}) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.register_buffer("classes", torch.zeros(config.num_labels, width))
        self.post_init()
        self.classes.normal_(std=1 / width)

    def _init_weights(self, module: nn.Module) -> None:
        """What transformers calls for every module of a model without weights."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 / module.in_features) ** 0.5)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits (rows, num_labels) of x (rows, width); with labels (rows,) also the cross-entropy."""
        layers: Any = self.layers
        first, *others = (layer["fc1"] for layer in layers)
        y = first(hidden)
        for layer in others:
            y = layer(y.relu())
        logits = y @ self.classes.T
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class RandomVectors:
    """Makes x of `RandomMLP`: for every key a vector of independent normal entries."""

    def __init__(self, config: RandomMLPConfig) -> None:
        self._width = config.hidden_size

    def save_pretrained(self, folder: str | Path) -> None:
        """Save nothing, as the vectors follow from the keys."""

    def __call__(self, keys: Sequence[Sequence[int]]) -> Tensor:
        """The vectors of keys, shape (keys, width), float32. keys: lists of integers of at least 0, the seeds."""
        drawn: Any = [np.random.default_rng(list(key)).normal(size=self._width) for key in keys]
        return torch.from_numpy(np.stack(drawn)).float()
