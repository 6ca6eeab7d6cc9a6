"""A BERT's last feed-forward block as a model of its own, and what lies below it, which turns keys into its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import AutoTokenizer, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput

KEYS_AT_ONCE = 64  # keys that are embedded together


class LastFeedForward(BertPreTrainedModel):  # type: ignore[misc]
    """Logits C y, shape (rows, num_labels), with y = LayerNorm(h + W₂ gelu(W₁ h + b₁) + b₂).

    h: the hidden state of the first token at the input of the last block's feed-forward layers, (rows, hidden), see
    `Below`. W₁ (intermediate, hidden) and W₂ (hidden, intermediate) have the names that they have in the whole model.
    C: `classes`, (num_labels, hidden), drawn from N(0, 1 / hidden), so that its rows are about 1 long; a buffer, which
    no method trains and no adapter saves. There is no dropout, as what is stored is all that is asked for.
    """

    main_input_name = "hidden"

    def __init__(self, config: Any) -> None:
        config.hidden_dropout_prob = 0.0
        super().__init__(config)
        block = nn.ModuleDict({"intermediate": BertIntermediate(config), "output": BertOutput(config)})
        layer = nn.ModuleDict({str(config.num_hidden_layers - 1): block})
        self.encoder = nn.ModuleDict({"layer": layer})
        self.register_buffer("classes", torch.zeros(config.num_labels, config.hidden_size))
        self.post_init()

    @classmethod
    def from_config(cls, config: Any) -> LastFeedForward:
        """The model with no weights loaded."""
        return cls(config)

    def draw_classes(self) -> None:
        """Draw C from torch's global generator."""
        self.classes.normal_(std=self.config.hidden_size**-0.5)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits of hidden states of shape (rows, hidden), and their cross-entropy where there are labels."""
        layer: Any = self.encoder["layer"]
        (block,) = layer.values()
        h = hidden.to(self.dtype)
        y = block.output(block.intermediate(h), h)
        logits = y @ self.classes.T
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class Below:
    """A BERT below the feed-forward layers of its last block, frozen: keys in, hidden states out."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        last = encoder.encoder.layer[-1]
        last.intermediate, last.output = nn.Identity(), _Residual()
        self._tokenizer, self._encoder = tokenizer, encoder.eval().requires_grad_(False)
        self._words = sorted(number for token, number in tokenizer.get_vocab().items() if token.isalpha())

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> Below:
        """The tokenizer and the encoder of a hub id or a folder, in float32."""
        encoder = BertModel.from_pretrained(source, add_pooling_layer=False, dtype=torch.float32, **options)
        return cls(AutoTokenizer.from_pretrained(source, **options), encoder)

    def save_pretrained(self, folder: str | Path) -> None:
        """The tokenizer; the encoder is the backbone's own."""
        self._tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def __call__(self, keys: Sequence[Sequence[int]]) -> Tensor:
        """The first token's hidden state of every key, shape (keys, hidden).

        A key is a number of tokens, all keys as many, each given by a number: token n is the word n mod W of the W
        tokens that are whole words.
        """
        words = torch.tensor(self._words)[torch.tensor(keys) % len(self._words)]
        ids = pad(words, (1, 0), value=self._tokenizer.cls_token_id)
        ids = pad(ids, (0, 1), value=self._tokenizer.sep_token_id)
        return torch.cat([self._encoder(part).last_hidden_state[:, 0] for part in torch.split(ids, KEYS_AT_ONCE)])


class _Residual(nn.Module):
    """What reaches the block by its residual path."""

    def forward(self, _: Tensor, residual: Tensor) -> Tensor:
        return residual
