"""CLIP as a classifier without a trained head: each class is the mean embedding of sentences about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPPreTrainedModel, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput


class ZeroShotCLIP(CLIPPreTrainedModel):  # type: ignore[misc]
    """Logits W z / ‖z‖ with z = P v, shape (rows, num_labels).

    - v: the pooled output of the vision tower, (rows, hidden).
    - P: CLIP's projection, (projection_dim, hidden).
    - W: `classes`, (num_labels, projection_dim), see `class_embeddings`; a buffer, which no method trains and no
      adapter saves.

    Source: Radford et al. (2021); fine-tuning with the frozen head follows Albert et al. (2025).
    """

    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.register_buffer("classes", torch.zeros(config.num_labels, config.projection_dim))
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits (rows, num_labels) of images (rows, 3, side, side); with labels (rows,) also the cross-entropy."""
        embedding = self.visual_projection(self.vision_model(pixel_values).pooler_output)
        logits = normalize(embedding, dim=-1) @ self.classes.T
        return ImageClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


@torch.no_grad()
def class_embeddings(clip: Any, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """W (classes, projection_dim) with w_k = e^τ m_k / ‖m_k‖, m_k the mean of t / ‖t‖ over the sentences of class k.

    - `clip`: a CLIPModel; its text tower embeds a sentence as t, and its logit scale is τ.
    - `tokenizer`: CLIP's.
    - `prompts`: the sentences of each class.

    Source: Radford et al. (2021), section 3.1.4.
    """
    means = []
    for sentences in prompts:
        tokens = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        pooled = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        means.append(normalize(clip.text_projection(pooled), dim=-1).mean(0))
    weights: Tensor = clip.logit_scale.exp() * normalize(torch.stack(means), dim=-1)
    return weights
