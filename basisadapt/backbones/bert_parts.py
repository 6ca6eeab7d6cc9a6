"""Parts of BERT's last block as models of their own, and what provides their inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import AutoTokenizer, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput

from basisadapt.backbones.files import stamps

BATCH_SIZE = 64  # keys that are embedded at once


class LastFeedForward(BertPreTrainedModel):  # type: ignore[misc]
    """Logits C y, shape (rows, num_labels), with y = LayerNorm(h + W₂ gelu(W₁ h + b₁) + b₂).

    - h: the hidden state of the first token at the input of the last block's feed-forward layers, (rows, hidden), from
      `FeedForwardInputs`.
    - W₁ (intermediate, hidden) and W₂ (hidden, intermediate): named as in the whole model.
    - C: `classes`, (num_labels, hidden), drawn from N(0, 1 / hidden), so that its rows have norms near 1; a buffer,
      which no method trains and no adapter saves.

    There is no dropout: the task asks only for stored facts.
    """

    main_input_name = "hidden"

    def __init__(self, config: Any) -> None:
        config.hidden_dropout_prob = 0.0
        super().__init__(config)
        self.encoder = _last_block(config, intermediate=BertIntermediate(config), output=BertOutput(config))
        self.register_buffer("classes", torch.zeros(config.num_labels, config.hidden_size))
        self.post_init()

    def draw_classes(self) -> None:
        """Draw C from torch's global generator."""
        self.classes.normal_(std=self.config.hidden_size**-0.5)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits (rows, num_labels) of hidden states (rows, hidden); with labels (rows,) also the cross-entropy."""
        block, h = _block(self.encoder), hidden.to(self.dtype)
        y = block["output"](block["intermediate"](h), h)
        logits = y @ self.classes.T
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class FeedForwardInputs:
    """BERT up to the feed-forward layers of its last block, frozen: makes h of `LastFeedForward` from keys."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        last = encoder.encoder.layer[-1]
        self._above = nn.ModuleList([last.intermediate, last.output]).eval().requires_grad_(False)
        last.intermediate, last.output = nn.Identity(), _Residual()
        self._tokenizer, self._encoder = tokenizer, encoder.eval().requires_grad_(False)
        self._words = sorted(number for token, number in tokenizer.get_vocab().items() if token.isalpha())

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> FeedForwardInputs:
        """Load the tokenizer and the encoder, in float32, from a hub id or a folder; the process caches
        the last until a file of the folder changes.
        """
        return _loaded(source, stamps(source), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer; the encoder is not saved, as it is the backbone's."""
        self._tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def __call__(self, keys: Sequence[Sequence[int]]) -> Tensor:
        """The hidden state of the first token for every key, shape (keys, hidden).

        keys: lists of integers, all of one length. The integer n stands for word n mod W of the W whole-word tokens.
        """
        words = torch.tensor(self._words)[torch.tensor(keys) % len(self._words)]
        ids = pad(words, (1, 0), value=self._tokenizer.cls_token_id)
        ids = pad(ids, (0, 1), value=self._tokenizer.sep_token_id)
        return torch.cat([self._encoder(part).last_hidden_state[:, 0] for part in torch.split(ids, BATCH_SIZE)])

    @torch.no_grad()
    def read(self, texts: Sequence[str], key: int, value: int) -> Tensor:
        """The hidden state of the first token for the first key + value tokens of every text, shape (texts, hidden)."""
        found = []
        for start in range(0, len(texts), BATCH_SIZE):
            part, most = list(texts[start : start + BATCH_SIZE]), key + value + 2
            batch = self._tokenizer(part, truncation=True, max_length=most, padding=True, return_tensors="pt")
            found.append(self._encoder(**batch).last_hidden_state[:, 0])
        return torch.cat(found)

    @torch.no_grad()
    def above(self, hidden: Tensor) -> Tensor:
        """y of `LastFeedForward` before training, of hidden states (..., hidden), in their shape."""
        intermediate, output = self._above
        return cast(Tensor, output(intermediate(hidden), hidden))


@functools.lru_cache(maxsize=1)
def _loaded(source: str, _: tuple[object, ...], **options: Any) -> FeedForwardInputs:
    encoder = BertModel.from_pretrained(source, add_pooling_layer=False, dtype=torch.float32, **options)
    return FeedForwardInputs(AutoTokenizer.from_pretrained(source, **options), encoder)


class LastQuery(BertPreTrainedModel):  # type: ignore[misc]
    """ΔW, shape (rows, m, n), of the query projection of the last block, whose weight W has shape (m, n).

    ΔW = Yᵀ − W, with Y the output of the adapted projection, without its bias, for the identity matrix.
    """

    main_input_name = "weight"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.encoder = _last_block(config, attention=nn.ModuleDict({"self": nn.ModuleDict({"query": query})}))
        self.post_init()

    def forward(self, weight: Tensor, target: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """The logits ΔW, and the loss ‖ΔW − T‖² / ‖T‖², for weight W and target T of shape (rows, m, n)."""
        query = _block(self.encoder)["attention"]["self"]["query"]
        unit = torch.eye(weight.shape[-1], dtype=self.dtype, device=weight.device)
        change = query(unit).T - weight
        loss = (change - target).square().sum() / target.square().sum()
        return SequenceClassifierOutput(loss=loss, logits=change)


class QueryWeight:
    """The weight W of `LastQuery` before training, shape (m, n), float32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> QueryWeight:
        """Load W from a hub id or a folder."""
        model = LastQuery.from_pretrained(source, dtype=torch.float32, **options)
        return cls(_block(model.encoder)["attention"]["self"]["query"].weight.detach())

    def save_pretrained(self, folder: str | Path) -> None:
        """Save nothing, as the weight is the backbone's."""


def _last_block(config: Any, **parts: nn.Module) -> nn.ModuleDict:
    """An encoder with only these parts of its last block, named as in the whole encoder."""
    below = [nn.Identity() for _ in range(config.num_hidden_layers - 1)]
    return nn.ModuleDict({"layer": nn.ModuleList([*below, nn.ModuleDict(parts)])})


def _block(encoder: Any) -> Any:
    """The last block of an encoder of parts."""
    return encoder["layer"][-1]


class _Residual(nn.Module):
    """Returns its second input, the residual stream."""

    def forward(self, _: Tensor, residual: Tensor) -> Tensor:
        return residual
