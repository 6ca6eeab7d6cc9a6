"""The last MLP of a Llama or a Qwen2 as a model of its own, and what provides its inputs."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from basisadapt.backbones.files import stamps
from basisadapt.core.errors import InputError

MLPS = {"llama": LlamaMLP, "qwen2": Qwen2MLP}  # by model type; their norms are the same
BATCH_SIZE = 64  # texts that are embedded at once
WORD = re.compile("[Ġ▁][A-Za-z]+")  # a token that is a word, with the mark of its beginning: BPE's or SentencePiece's


class LastMLP(PreTrainedModel):  # type: ignore[misc]
    """Logits C norm(h + mlp(norm′(h))), shape (rows, tokens, num_labels).

    - h: the residual stream at the last block's MLP, (rows, tokens, hidden), from `MLPInputs`.
    - norm′, mlp: the last block's; norm: the model's. Their names are those in the whole model.
    - C: `classes`, (num_labels, hidden), the rows of the model's own head for the words; a buffer, which no method
      trains and no adapter saves.
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
        """Logits (rows, tokens, num_labels) of h, and their mean cross-entropy, for classes `words` (rows, tokens)."""
        parts: Any = self.model
        block, h = parts["layers"][-1], hidden.to(self.dtype)
        y = parts["norm"](h + block["mlp"](block["post_attention_layernorm"](h)))
        logits = y @ self.classes.T
        return SequenceClassifierOutput(loss=cross_entropy(logits.flatten(0, 1), words.flatten()), logits=logits)


class MLPInputs:
    """A language model up to its last MLP, frozen: makes h of `LastMLP` from keys and values; and its head."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer, self._head = tokenizer, model.get_output_embeddings().weight.detach()
        last = model.model.layers[-1]
        above = nn.ModuleList([last.post_attention_layernorm, last.mlp, model.model.norm])
        self._above = above.eval().requires_grad_(False)
        last.mlp, model.model.norm = _Zero(), nn.Identity()
        self._body = model.model.eval().requires_grad_(False)
        self._words = sorted(number for token, number in tokenizer.get_vocab().items() if WORD.fullmatch(token))

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> MLPInputs:
        """Load the tokenizer and the model, in float32, on a GPU if there is one, from a hub id or a folder.

        The process caches the last one, since it is a whole model, until a file of the folder changes.
        """
        return _loaded(source, stamps(source), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer; the model is not saved, as it is the backbone's."""
        self._tokenizer.save_pretrained(folder)

    def classes(self, count: int) -> Tensor:
        """The head's rows for `count` words, evenly spaced in the vocabulary, shape (count, hidden).

        Raises InputError if the vocabulary has fewer.
        """
        return cast(Tensor, self._head[self._class_ids(count).to(self._head.device)])

    @torch.no_grad()
    def __call__(self, keys: Sequence[Sequence[int]], values: Sequence[Sequence[int]], count: int) -> Tensor:
        """The residual stream from which each token of a value is predicted, shape (rows, tokens of a value, hidden).

        - `keys`: lists of integers, all of one length; n stands for word n mod W of the W words.
        - `values`: lists of classes, all of one length; class c is the c-th of the `count` words of `classes`.

        A text is a key followed by its value; each token is predicted from those before it.
        """
        words = torch.tensor(self._words)
        ids = torch.cat([words[torch.tensor(keys) % len(words)], self._class_ids(count)[torch.tensor(values)]], dim=1)
        return self._states(ids, len(keys[0]))

    @torch.no_grad()
    def read(self, texts: Sequence[str], key: int, value: int) -> Tensor:
        """The residual stream from which the tokens after the first `key` tokens of every text are predicted, shape
        (texts, value, hidden). Texts have at least key + value words."""
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return self._states(torch.tensor([one[: key + value] for one in ids]), key)

    @torch.no_grad()
    def above(self, hidden: Tensor) -> Tensor:
        """y of `LastMLP` before training, C y being its logits, of hidden states (..., hidden), in their shape."""
        before, mlp, after = self._above
        h = hidden.to(self._head.device)
        return cast(Tensor, after(h + mlp(before(h))).cpu())

    def _states(self, ids: Tensor, key: int) -> Tensor:
        """The residual stream from which the tokens after the first `key` ones of each text (texts, tokens) follow."""
        device = self._head.device
        parts = torch.split(ids[:, :-1], BATCH_SIZE)
        return torch.cat([self._body(part.to(device)).last_hidden_state[:, key - 1 :].cpu() for part in parts])

    def _class_ids(self, count: int) -> Tensor:
        if len(self._words) < count:
            raise InputError(f"its vocabulary has {len(self._words)} words, and {count} are needed for values")
        return torch.tensor([self._words[place * len(self._words) // count] for place in range(count)])


@functools.lru_cache(maxsize=1)
def _loaded(source: str, _: tuple[object, ...], **options: Any) -> MLPInputs:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
    return MLPInputs(AutoTokenizer.from_pretrained(source, **options), model.to(device))


class _Zero(nn.Module):
    """An MLP that adds nothing to the residual stream."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)
