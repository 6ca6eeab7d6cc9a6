"""Tasks of language models that complete prompts: training, scoring and generation of responses."""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from basisadapt.core.errors import InputError
from basisadapt.tasks.task import Example, Rows, Task

IGNORED = -100  # torch's label for tokens that a loss leaves out
LOGITS = 2**27  # logits in memory at a time: half a GB in float32


@dataclass(frozen=True)
class Question:
    """The input of a completion task's row; tasks extend it. prompt: all that the model reads before its response."""

    prompt: str


@dataclass(frozen=True)
class Continuation:
    """A text whose probability is measured.

    - `text` (str): the text.
    - `lead` (str, default ""): what the model reads between the prompt and the text; it is not scored.
    - `ends` (bool, default False): the token that ends a response belongs to the text.
    """

    text: str
    lead: str = ""
    ends: bool = False


@dataclass(frozen=True)
class Probe:
    """The texts whose probabilities evaluation measures for a row.

    - `prompt` (str): that of the question, or a plain one.
    - `continuations`: texts after the prompt.
    - `right` (int, default 0): the index of the correct one.
    """

    prompt: str
    continuations: tuple[Continuation, ...]
    right: int = 0


class CompletionTask(Task):
    """Inputs are `Question`s, labels the responses, as texts.

    A training example is the prompt, the response and the token that ends it; the loss covers the prompt only with
    data.train_on_inputs. A training row of more than train.max_length tokens is dropped, never truncated; a question is
    always asked in full. Evaluation scores the continuations of `probe` (`teacher_forced`), or lets the model generate
    text (`generate`).
    """

    form = "completion"
    num_labels = 1
    max_length = None

    @abstractmethod
    def probe(self, question: Any, response: str) -> Probe:
        """The texts that evaluation scores for a question; for free answers, the response."""

    @abstractmethod
    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss on a batch of probes, a scalar, and the answers, shape (rows, ...)."""

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """For training, input_ids and labels, without rows that are too long; for evaluation, prompts and probes.

        Raises InputError if every training row is longer than max_length, or a question is longer than the model can
        read.
        """
        return self._trained(rows, processor, max_length) if training else self._probed(rows, processor)

    def _trained(self, rows: Rows, processor: Any, max_length: int | None) -> list[Example]:
        prompts = [question.prompt for question in rows.inputs]
        starts = token_ids(processor, prompts)
        wholes = _extended(processor, prompts, starts, rows.labels)
        sizes = [len(whole) + 1 for whole in wholes]
        limit = min(max_length or processor.model_max_length, processor.model_max_length)
        if min(sizes) > limit:
            raise InputError(
                f"no training row fits into {limit} tokens (train.max_length, or what the backbone reads): they have "
                f"{min(sizes)} to {max(sizes)}; train.max_length=null sets no limit"
            )
        examples: list[Example] = []
        for start, whole, size in zip(starts, wholes, sizes, strict=True):
            if size <= limit:
                ids = [*whole, processor.eos_token_id]
                hidden = 0 if self.settings.train_on_inputs else len(start)
                examples.append({"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]})
        return examples

    def _probed(self, rows: Rows, processor: Any) -> list[Example]:
        probes = [self.probe(*row) for row in zip(rows.inputs, rows.labels, strict=True)]
        prompts = [probe.prompt for probe in probes]
        begin = processor.bos_token_id if processor.bos_token_id is not None else processor.eos_token_id
        starts = [ids or [begin] for ids in token_ids(processor, prompts)]
        owners = [row for row, probe in enumerate(probes) for _ in probe.continuations]
        texts = [continuation for probe in probes for continuation in probe.continuations]
        leads = [prompts[row] + text.lead for row, text in zip(owners, texts, strict=True)]
        led = _extended(
            processor, [prompts[row] for row in owners], [starts[row] for row in owners], [text.lead for text in texts]
        )
        wholes = _extended(processor, leads, led, [text.text for text in texts])
        longest = max(map(len, wholes))
        if longest > processor.model_max_length:
            raise InputError(
                f"a question with its answer has {longest} tokens, but the backbone reads at most "
                f"{processor.model_max_length}"
            )

        examples: list[dict[str, Any]] = [
            {"input_ids": start, "continuations": [], "labels": [], "right": probe.right}
            for start, probe in zip(starts, probes, strict=True)
        ]
        for row, text, before, whole in zip(owners, texts, led, wholes, strict=True):
            ids = [*whole, processor.eos_token_id] if text.ends else whole
            size = len(starts[row])
            examples[row]["continuations"].append(ids[size:])
            examples[row]["labels"].append([IGNORED] * (len(before) - size) + ids[len(before) :])
        return list(examples)

    def collator(self, processor: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
        """Pads on the left, so that all rows end in the same column and scored tokens occupy few columns.

        For training examples:

        - `input_ids`, `attention_mask`, `position_ids`, `labels`: shape (rows, length).
        - `scored`: the positions before those that hold labels. With data.packed see `packed`.

        For probes, where the tokens that all continuations of a row begin with are called shared:

        - `input_ids`, `attention_mask`: the prompts, shape (rows, length).
        - `read_ids`, `read_mask`: the prompts followed by the shared tokens.
        - `shared`: the shared tokens, shape (rows, most shared tokens), padded on the left with -100.
        - `continuations`: the other tokens, shape (rows, continuations, tokens), padded on the right.
        - `labels`: all tokens of the continuations, padded on the right with -100.
        - `right`: the index of the correct continuation, shape (rows,).
        """
        pad = processor.pad_token_id

        def collate(examples: list[Example]) -> dict[str, Any]:
            if "continuations" not in examples[0]:
                return packed(examples, pad) if self.settings.packed else padded(examples, pad)
            shared = [_shared(example["continuations"]) for example in examples]
            rests = [[ids[len(s) :] for ids in e["continuations"]] for e, s in zip(examples, shared, strict=True)]
            read = pad_left([[*e["input_ids"], *s] for e, s in zip(examples, shared, strict=True)], pad)
            return {
                **pad_left([example["input_ids"] for example in examples], pad),
                "read_ids": read["input_ids"],
                "read_mask": read["attention_mask"],
                "shared": _padded_left(shared, IGNORED),
                "continuations": _block(rests, pad),
                "labels": _block([example["labels"] for example in examples], IGNORED),
                "right": torch.tensor([example["right"] for example in examples]),
            }

        return collate


def padded(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """A batch of training examples, one per row; see `CompletionTask.collator`. pad: the padding token's id."""
    batch = pad_left([example["input_ids"] for example in examples], pad)
    labels = _padded_left([_predicted(example) for example in examples], IGNORED)
    places = positions(batch["attention_mask"])
    return {**batch, "position_ids": places, "labels": labels, "scored": _scored(labels)}


def packed(examples: Sequence[Example], pad: int) -> dict[str, Tensor | bool]:
    """A batch of training examples, packed end to end into sequences as long as the longest one (first fit).

    Tensors have shape (sequences, length); `scored` is as in `CompletionTask.collator`. There is no attention mask:
    models of transformers separate rows by position_ids, which restart at 0 with each row (see `reads_rows_apart`).
    Every padding token is a row of its own, without labels.
    """
    rows = sorted(examples, key=lambda example: -len(example["input_ids"]))
    length = len(rows[0]["input_ids"])
    sequences: list[list[Example]] = []
    room: list[int] = []
    for row in rows:
        size = len(row["input_ids"])
        place = next((index for index, left in enumerate(room) if left >= size), len(room))
        if place == len(room):
            sequences.append([])
            room.append(length)
        sequences[place].append(row)
        room[place] -= size

    def laid(values: Callable[[Example], list[int]], fill: int) -> Tensor:
        filled = ([token for row in sequence for token in values(row)] for sequence in sequences)
        return torch.tensor([tokens + [fill] * (length - len(tokens)) for tokens in filled])

    labels = laid(_predicted, IGNORED)
    return {
        "input_ids": laid(lambda row: row["input_ids"], pad),
        "position_ids": laid(lambda row: list(range(len(row["input_ids"]))), 0),
        "labels": labels,
        "use_cache": False,  # with a cache, models do not separate rows by position_ids
        "scored": _scored(labels),
    }


def _predicted(example: Example) -> list[int]:
    """The labels of an example, the first one ignored, since nothing predicts it."""
    return [IGNORED, *example["labels"][1:]]


def _scored(labels: Tensor) -> Tensor:
    """The positions in the flattened batch whose next token has a label, shape (labels,)."""
    return (labels.flatten()[1:] != IGNORED).nonzero().squeeze(1)


@torch.no_grad()
def reads_rows_apart(model: Any, examples: Sequence[Example], pad: int) -> bool:
    """Whether a model in evaluation mode has the same loss, up to rounding, on packed as on separate rows."""
    device = next(model.parameters()).device
    losses = []
    for batch in (padded(examples, pad), packed(examples, pad)):
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        losses.append(batch_loss(model, inputs)[1])
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return bool((losses[0] - losses[1]).abs() <= (2e-3 if exact else 2e-2) * losses[0].abs())


def pad_left(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask of prompts, shape (rows, length), padded on the left with `pad`."""
    mask = _padded_left([[1] * len(row) for row in prompts], 0)
    return {"input_ids": _padded_left(prompts, pad), "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    """The position of every token in its row, from and in the shape of an attention mask (rows, length)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _padded_left(rows: Sequence[list[int]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[fill] * (length - len(row)) + row for row in rows], dtype=torch.long)


def _shared(continuations: Sequence[list[int]]) -> list[int]:
    """The longest common beginning of a row's continuations that leaves each at least one token."""
    columns = zip(*(ids[:-1] for ids in continuations), strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def _block(rows: Sequence[Sequence[list[int]]], fill: int) -> Tensor:
    """Lists of lists of tokens as one tensor, shape (rows, most lists, most tokens), padded with `fill`."""
    lists, tokens = max(map(len, rows)), max(len(ids) for row in rows for ids in row)
    block = torch.full((len(rows), lists, tokens), fill)
    for i, row in enumerate(rows):
        for j, ids in enumerate(row):
            block[i, j, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return block


def token_ids(processor: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The token ids of each text, without a final end-of-text token; special: add the tokenizer's special tokens."""
    encoded: list[list[int]] = processor(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == processor.eos_token_id else ids for ids in encoded]


def _extended(processor: Any, starts: Sequence[str], ids: Sequence[list[int]], texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each start followed by its text; they begin with the start's own `ids`.

    Both are tokenized together, as in pretraining, or separately if that would change the tokens of the start.
    """
    wholes = token_ids(processor, [start + text for start, text in zip(starts, texts, strict=True)])
    return [
        whole if whole[: len(before)] == before else before + token_ids(processor, [text], special=False)[0]
        for whole, before, text in zip(wholes, ids, texts, strict=True)
    ]


@torch.no_grad()
def teacher_forced(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of every token of the continuations, in float32, and whether the token is the most likely one.

    Both have the shape of the labels, (rows, continuations, tokens), and are zero where a label is -100. The model
    reads the prompt and the shared tokens of a row once; the rest of each continuation starts from a copy of their
    cache. batch: of probes, see `CompletionTask.collator`.
    """
    rows = len(batch["labels"])
    columns = batch["shared"].shape[1] + batch["continuations"].shape[-1]
    at_once = max(1, LOGITS // (columns * model.config.get_text_config().vocab_size))
    parts = [
        _teacher_forced(model, {name: tensor[row : row + at_once] for name, tensor in batch.items()})
        for row in range(0, rows, at_once)
    ]
    log_probs, likeliest = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(likeliest)


def _teacher_forced(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    mask, shared, rests = batch["read_mask"], batch["shared"], batch["continuations"]
    (width, length), places = (shared.shape[1], rests.shape[-1]), positions(mask)
    prompt = model(
        input_ids=batch["read_ids"],
        attention_mask=mask,
        position_ids=places,
        use_cache=length > 1,
        logits_to_keep=width + 1,
    )
    logits = prompt.logits[:, -width - 1 :]
    of_shared = _looked_up(logits[:, :-1], shared)
    found = []
    for tokens in rests.unbind(1):
        of_rest = logits[:, -1:]
        if length > 1:
            output = model(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), length - 1)], dim=1),
                position_ids=places[:, -1:] + torch.arange(1, length, device=places.device),
                past_key_values=copy.deepcopy(prompt.past_key_values),
                use_cache=True,
            )
            of_rest = torch.cat([of_rest, output.logits], dim=1)
        parts = zip(of_shared, _looked_up(of_rest, tokens), strict=True)
        found.append([torch.cat(part, dim=1) for part in parts])
    log_probs, likeliest = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
    # A row's shared tokens are aligned at their end, so its first token is at the first column that is not padding.
    labels = batch["labels"]
    begin = (shared == IGNORED).sum(1)[:, None] + torch.arange(labels.shape[-1], device=labels.device)
    place = begin.clamp(max=width + length - 1)[:, None].expand(labels.shape)
    counted = labels != IGNORED
    return log_probs.gather(2, place).where(counted, 0.0), likeliest.gather(2, place) & counted


def _looked_up(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """log p of `tokens`, shape (rows, tokens), float32, and whether each is the most likely one."""
    losses = functional.cross_entropy(logits.float().transpose(1, 2), tokens, ignore_index=IGNORED, reduction="none")
    return -losses, logits.argmax(-1) == tokens


def batch_loss(model: Any, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """The model's outputs on a batch of training examples, and the summed loss of its labels, a float32 scalar.

    To save memory, logits are computed only at the scored positions, shape (1, scored, vocabulary).
    """
    scored, labels = batch["scored"], batch["labels"]
    head = getattr(model, "module", model).get_output_embeddings()  # DDP wraps a model
    # transformers' `logits_to_keep` selects whole columns, and packed rows are scored in nearly all of them.
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[None, scored], *inputs[1:]))
    try:
        outputs = model(**{name: value for name, value in batch.items() if name not in ("labels", "scored")})
    finally:
        hook.remove()
    target = labels.flatten()[scored + 1]
    return outputs, functional.cross_entropy(outputs["logits"][0].float(), target, reduction="sum")


def response_loss(log_probs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over rows of the correct continuation's mean loss per token, a scalar.

    log_probs: of `teacher_forced`, shape (rows, continuations, tokens). It does not depend on how rows are batched.
    """
    chosen = torch.arange(len(log_probs), device=log_probs.device), batch["right"]
    tokens = (batch["labels"][chosen] != IGNORED).sum(-1)
    return -(log_probs[chosen].sum(-1) / tokens.clamp(min=1)).mean()


@torch.no_grad()
def generate(
    model: Any, batch: Mapping[str, Tensor], max_new_tokens: int, temperatures: Tensor | None = None
) -> Tensor:
    """Token ids that the model generates after left-padded prompts, shape (rows, max_new_tokens), padded at the end.

    temperatures: one for each row, shape (rows,); 0 is greedy. None is greedy for every row.
    """
    prompts, pad = batch["input_ids"], model.config.pad_token_id
    written = model.generate(
        input_ids=prompts,
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=temperatures is not None,
        logits_processor=[] if temperatures is None else [_tempered(temperatures)],
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        # A backbone's generation_config may have other values.
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
    )[:, prompts.shape[1] :]
    return functional.pad(written, (0, max_new_tokens - written.shape[1]), value=pad)


def _tempered(temperatures: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that divides each row's logits by its temperature; at 0 only the likeliest token remains."""
    warm = temperatures.clamp(min=1e-3)[:, None]

    def temper(_: Tensor, logits: Tensor) -> Tensor:
        # A model that diverged may have NaN logits, and then generates arbitrary tokens; its loss shows the divergence.
        logits = (logits - logits.amax(-1, keepdim=True)).nan_to_num(nan=0.0, neginf=-torch.inf)
        likeliest = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(-1, keepdim=True), True)
        only = logits.masked_fill(~likeliest, -torch.inf)
        return torch.where(temperatures[:, None] > 0, logits / warm, only)

    return temper
