"""The last MLP of a Llama or a Qwen2 as a model of its own, and what makes its inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from basisadapt.core.errors import InputError

MLPS = {"llama": LlamaMLP, "qwen2": Qwen2MLP}  # by model type; their norms are the same
TEXTS_AT_ONCE = 64  # texts that are embedded together
SPACES = "Ġ▁"  # by which the vocabularies of BPE and SentencePiece mark a token that begins a word


class LastMLP(PreTrainedModel):  # type: ignore[misc]
    """Logits C norm(h + mlp(norm′(h))), shape (rows, tokens, num_labels).

    h: the residual stream at the last block's MLP, (rows, tokens, hidden), see `BelowMLP`. norm′, mlp and norm, the
    last block's and the model's, have the names that they have in the whole model. C: `classes`, (num_labels, hidden),
    the rows of the model's own head that belong to the words; a buffer, which no method trains and no adapter saves.
    """

    main_input_name = "hidden"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        block = {
            "mlp": MLPS[config.model_type](config),
            "post_attention_layernorm": LlamaRMSNorm(config.hidden_size, config.rms_norm_eps),
        }
        below = [nn.Identity() for _ in range(config.num_hidden_layers - 1)]
        layers = nn.ModuleList([*below, nn.ModuleDict(block)])
        self.model = nn.ModuleDict({"layers": layers, "norm": LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.register_buffer("classes", torch.zeros(config.num_labels, config.hidden_size))
        self.post_init()

    def forward(self, hidden: Tensor, words: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits for h, and their mean cross-entropy for `words`, the right classes, of shape (rows, tokens)."""
        parts: Any = self.model
        block, h = parts["layers"][-1], hidden.to(self.dtype)
        y = parts["norm"](h + block["mlp"](block["post_attention_layernorm"](h)))
        logits = y @ self.classes.T
        return SequenceClassifierOutput(loss=cross_entropy(logits.flatten(0, 1), words.flatten()), logits=logits)


class BelowMLP:
    """A language model below its last MLP, frozen: keys and values in, the residual stream out; and its head."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer, self._head = tokenizer, model.get_output_embeddings().weight.detach()
        model.model.layers[-1].mlp, model.model.norm = _Nothing(), nn.Identity()
        self._body = model.model.eval().requires_grad_(False)
        vocabulary = tokenizer.get_vocab().items()
        self._words = sorted(n for token, n in vocabulary if token[:1] in SPACES and _is_word(token[1:]))

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> BelowMLP:
        """The tokenizer and the model of a hub id or a folder, in float32, on a GPU where there is one.

        A process keeps the last one, for it is the whole model.
        """
        return _known(source, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """The tokenizer; the rest is the backbone's own."""
        self._tokenizer.save_pretrained(folder)

    def classes(self, count: int) -> Tensor:
        """The head's rows of `count` words that are evenly spread over all, shape (count, hidden).

        Raises InputError where the vocabulary has fewer.
        """
        rows: Tensor = self._head[self._spread(count).to(self._head.device)]
        return rows

    @torch.no_grad()
    def __call__(self, keys: Sequence[Sequence[int]], values: Sequence[Sequence[int]], count: int) -> Tensor:
        """The residual stream where each token of a value is to be told, shape (rows, tokens of a value, hidden).

        A key is a number of tokens, all keys as many, each given by a number: token n is the word n mod W of the W
        words. A value is a number of classes, all values as many; class c is the c-th of the `count` words of
        `classes`. A text is a key and its value, each word after all that stands before it.
        """
        known = torch.tensor(self._words)
        ids = torch.cat([known[torch.tensor(keys) % len(known)], self._spread(count)[torch.tensor(values)]], dim=1)
        first, device = len(keys[0]) - 1, self._head.device
        parts = torch.split(ids[:, :-1], TEXTS_AT_ONCE)
        return torch.cat([self._body(part.to(device)).last_hidden_state[:, first:].cpu() for part in parts])

    def _spread(self, count: int) -> Tensor:
        if len(self._words) < count:
            raise InputError(f"its vocabulary has {len(self._words)} words, and {count} are needed for values")
        return torch.tensor([self._words[place * len(self._words) // count] for place in range(count)])


@functools.lru_cache(maxsize=1)
def _known(source: str, **options: Any) -> BelowMLP:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
    return BelowMLP(AutoTokenizer.from_pretrained(source, **options), model.to(device))


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha()


class _Nothing(nn.Module):
    """An MLP that adds nothing to the residual stream."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)
