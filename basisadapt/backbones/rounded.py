"""Models whose blocks are rounded to 4 bits, held against what they were before; and the models before."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from basisadapt.backbones.files import stamps
from basisadapt.core.errors import InputError

LEVELS = 16  # of 4 bits
GROUP = 64  # weights that share a scale
BATCH_SIZE = 32  # texts that are read at once
LOGITS = 2**27  # logits in memory at a time: half a GB in float32


@functools.cache
def normal_float() -> Tensor:
    """The 16 values of NF4, ascending, float64: quantiles of N(0, 1), divided by the largest.

    Their probabilities are evenly spaced from δ to 1/2 and from 1/2 to 1 − δ, with 7 and 8 steps and
    δ = (1/30 + 1/32) / 2. Source: Dettmers et al. (2023), QLoRA.
    """
    half = LEVELS // 2
    end = (1 / (2 * (LEVELS - 1)) + 1 / (2 * LEVELS)) / 2
    below = torch.linspace(end, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - end, half + 1, dtype=torch.float64)
    values: Tensor = torch.special.ndtri(torch.cat([below, above[1:]]))
    return values / values.max()


def rounded(weight: Tensor) -> Tensor:
    """Every weight w as s q, q the value of NF4 nearest to w / s, s = max |w| of its group; in shape and dtype of w.

    A group is 64 consecutive weights, row by row. Source: Dettmers et al. (2023), QLoRA, without double quantization.
    """
    values = normal_float().to(weight)
    groups = pad(weight.flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    nearest = torch.bucketize(groups / scale, (values[1:] + values[:-1]) / 2)
    return (scale * values[nearest]).flatten()[: weight.numel()].view_as(weight)


class RoundedModel(PreTrainedModel):  # type: ignore[misc]
    """A model that is held against what its last hidden states were before its weights were rounded.

    It is not rounded before `round_weights` is called. There is no dropout: the states are to be those of before.
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights of all linear layers of the blocks (`rounded`); biases, norms and embeddings stay."""
        for module in self.base_model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight))

    @abstractmethod
    def compare(self, states: Tensor, targets: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Numbers of each row, shape (rows, numbers): the divergence first, which training lowers.

        - `states`, `targets`: last hidden states, found and wanted, (rows, tokens, hidden).
        - `input_ids`: (rows, tokens).
        - `mask`: True for tokens that are not padding, (rows, tokens).
        """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """The numbers of `compare` as logits, and the mean divergence as loss; labels are not read."""
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        numbers = self.compare(states.float(), targets, input_ids, attention_mask.bool())
        return SequenceClassifierOutput(loss=numbers[:, 0].mean(), logits=numbers)


class RoundedEncoder(RoundedModel):
    """BERT. The divergence of a row is Σ‖h − h*‖² / Σ‖h*‖² over its tokens, h* the hidden states of before."""

    base_model_prefix = "bert"

    def __init__(self, config: Any) -> None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def compare(self, states: Tensor, targets: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The divergence, shape (rows, 1)."""
        error, size = (((x * mask[..., None]) ** 2).sum(dim=(1, 2)) for x in (states - targets, targets))
        return (error / size)[:, None]


class RoundedLanguageModel(RoundedModel):
    """A Llama or a Qwen2. Its head, which is not rounded, reads both hidden states as distributions of the next token.

    The numbers of a row are the means over its tokens of KL(p* ‖ p), p* the distribution of before, and of −log p of
    the token that follows, both in nats.
    """

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        config.attention_dropout = 0.0
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def compare(self, states: Tensor, targets: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The divergence and the loss, shape (rows, 2)."""
        followed = pad(mask[:, 1:], (0, 1))
        following = input_ids.roll(-1, dims=1)
        at_once = max(1, LOGITS // self.lm_head.out_features)
        parts = zip(*(x[mask].split(at_once) for x in (states, targets, following)), strict=True)
        divergence, loss = torch.cat([self._of_tokens(*part) for part in parts]).unbind(1)
        found = [_row_means(divergence, mask, mask), _row_means(loss, mask, followed)]
        return torch.stack(found, dim=1)

    def _of_tokens(self, states: Tensor, targets: Tensor, following: Tensor) -> Tensor:
        """Both numbers of every token, shape (tokens, 2)."""
        found, wanted = (self.lm_head(x).float().log_softmax(dim=-1) for x in (states, targets))
        divergence = kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
        return torch.stack([divergence, -found.gather(1, following[:, None])[:, 0]], dim=1)


def _row_means(numbers: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """The means over the counted tokens of each row; numbers: one for each token of `mask`."""
    table = numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)
    return (table * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


class OriginalModel:
    """A tokenizer, and a model before and after rounding, both frozen; final classes say which model it is."""

    model: ClassVar[type[RoundedModel]]

    def __init__(self, tokenizer: Any, exact: RoundedModel, rounded: RoundedModel) -> None:
        self.tokenizer, self._exact, self._rounded = tokenizer, exact, rounded

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> OriginalModel:
        """Load both, in float32, on a GPU if there is one, from a hub id or a folder.

        The process caches the last ones, since they are two whole models, until a file of the folder changes. Raises
        InputError if rounding changes no weight.
        """
        return cls(*_loaded(cls.model.from_pretrained, source, stamps(source), **options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer; the model is not saved, as it is the backbone's."""
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
        """The last hidden states before rounding, (tokens, hidden), of each text, a list of token ids; and the numbers
        of `RoundedModel.compare` after and before rounding, (2, numbers)."""
        targets: list[Tensor] = []
        numbers: list[Tensor] = []
        for start in range(0, len(texts), BATCH_SIZE):
            part = texts[start : start + BATCH_SIZE]
            batch = {name: x.to(self._exact.device) for name, x in padded(list(map(torch.tensor, part))).items()}
            states = self._exact.base_model(**batch).last_hidden_state
            found = [model(**batch, targets=states).logits for model in (self._rounded, self._exact)]
            numbers += torch.stack(found, dim=1).cpu()
            targets += [one[: len(ids)].cpu() for one, ids in zip(states, part, strict=True)]
        return targets, numbers


class OriginalEncoder(OriginalModel):
    """That of `RoundedEncoder`."""

    model = RoundedEncoder


class OriginalLanguageModel(OriginalModel):
    """That of `RoundedLanguageModel`."""

    model = RoundedLanguageModel


@functools.lru_cache(maxsize=1)
def _loaded(
    load: Callable[..., RoundedModel], source: str, _: tuple[object, ...], **options: Any
) -> tuple[Any, RoundedModel, RoundedModel]:
    """The tokenizer, and the model before and after rounding."""
    config = AutoConfig.from_pretrained(source, **options)
    exact = load(source, config=config, dtype=torch.float32, use_safetensors=True, **options)
    exact.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
    after = copy.deepcopy(exact)
    after.round_weights()
    if all(map(torch.equal, exact.parameters(), after.parameters())):
        raise InputError("rounding its weights to 4 bits changes none of them, so nothing can be recovered")
    return AutoTokenizer.from_pretrained(source, **options), exact, after


def padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """input_ids and attention_mask, shape (rows, most tokens), of texts of token ids; padded at the end."""
    mask = pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
    return {"input_ids": pad_sequence(list(texts), batch_first=True), "attention_mask": mask}
