"""Limits on a backbone's inputs: the number of its positions, and the tokens that have embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from basisadapt.backbones.catalogue import Backbone
from basisadapt.backbones.failures import explained
from basisadapt.backbones.forms import FORMS, ROUNDED
from basisadapt.core.errors import InputError

POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def most_tokens(model: nn.Module) -> int | None:
    """The number of tokens for which a text model has learned position embeddings; None without them (rotary).

    RoBERTa and its relatives count positions from after the padding token's index, OPT and BART from an offset.
    """
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] in POSITIONS]
    counts = [
        table.num_embeddings - (getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1)
        for table in tables
        if isinstance(table, nn.Embedding)
    ]
    return min(counts, default=None)


def check_inputs(backbone: Backbone, form: str, model: transformers.PreTrainedModel, max_length: int | None) -> None:
    """Raise InputError if a task of that form would give the model more tokens than it has positions, or unknown ones.

    model: may be on the meta device. Only the tokenizer of a local folder is checked here; `load` checks all.
    """
    if FORMS[form].processor != "AutoTokenizer" and form not in ROUNDED:
        return
    most = most_tokens(model)
    if max_length is not None and most is not None and max_length > most:
        raise InputError(
            f"train.max_length must be at most {most}, the positions of backbone {backbone.name!r}, got {max_length}"
        )
    if backbone.package is None and Path(backbone.source).is_dir():
        with explained(backbone):
            tokenizer = transformers.AutoTokenizer.from_pretrained(backbone.source, trust_remote_code=False)
        check_tokenizer(backbone, form, tokenizer, model)


def check_tokenizer(backbone: Backbone, form: str, tokenizer: Any, model: transformers.PreTrainedModel) -> None:
    """Raise InputError if there is no vocabulary, a token has no embedding, or no token can pad or end a text."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a missing vocabulary
        raise InputError(f"backbone {backbone.name!r} has no tokenizer")
    embeddings: Any = model.get_input_embeddings()
    if (last := _last_token(tokenizer)) >= embeddings.num_embeddings:
        raise InputError(
            f"backbone {backbone.name!r} has embeddings for {embeddings.num_embeddings} tokens, but its tokenizer "
            f"has ids up to {last}: they do not belong together"
        )
    if tokenizer.eos_token is None and (form == "completion" or tokenizer.pad_token is None):
        needed = "ends an answer" if form == "completion" else "pads a batch"
        raise InputError(
            f"the tokenizer of backbone {backbone.name!r} has no eos_token, so nothing {needed}; "
            "set it in its tokenizer_config.json"
        )


def _last_token(tokenizer: Any) -> int:
    """The largest token id that can occur in an input; special tokens that never occur may be larger."""
    numbers: set[int] = set(tokenizer.get_vocab().values())
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    put = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    put |= {tokenizer.cls_token_id, tokenizer.sep_token_id}
    return max((numbers - special) | (put - {None}))
