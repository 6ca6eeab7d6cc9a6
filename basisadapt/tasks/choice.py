"""Multiple-choice questions, and three ways to determine which option a language model chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from basisadapt.tasks.completion import (
    CompletionTask,
    Continuation,
    Probe,
    Question,
    generate,
    response_loss,
    teacher_forced,
)
from basisadapt.tasks.task import Rows

WRITTEN = 32  # new tokens that the published scripts let a model generate
RESPONSE = "### Response:"


@dataclass(frozen=True)
class Option:
    """An option of a question.

    - `name` (str): such as "answer3".
    - `response` (str): the response that chooses it.
    - `text` (str): its text.
    - `lead` (str, default ""): the unscored words between the plain question and the text.
    """

    name: str
    response: str
    text: str
    lead: str = ""


@dataclass(frozen=True)
class ChoiceQuestion(Question):
    """A question with options.

    - `prompt` (str): all that the model reads before its response.
    - `group` (str): the task of a suite to whose accuracy it counts.
    - `names`: the names that the published rule searches for in an answer.
    - `plain` (str): the question without instructions, which the texts of the options continue.
    - `options`: the options, in order.
    - `per_character` (bool): divide the log-probabilities of the texts by their lengths in characters.
    """

    group: str
    names: tuple[str, ...]
    plain: str
    options: tuple[Option, ...]
    per_character: bool


class ChoiceTask(CompletionTask):
    """Inputs are `ChoiceQuestion`s, labels the response of the correct option.

    data.scoring selects how the model's choice is determined:

    - "likelihood": the option whose response has the largest log p after the prompt.
    - "cloze": the option whose text has the largest log p as a continuation of the plain question, per character if the
      question says so.
    - "generation": the first name in up to 32 greedily decoded tokens (`extract`); one of the published scripts uses
      beam search with four beams instead.

    eval_loss is the mean loss per token of the correct text: of the option in "cloze", otherwise of the response.
    """

    headline = "accuracy"

    def probe(self, question: ChoiceQuestion, response: str) -> Probe:
        """The responses after the prompt, the texts after the plain question, or only the correct response."""
        if self.settings.scoring == "generation":
            return Probe(question.prompt, (Continuation(response, ends=True),))
        right = [option.response for option in question.options].index(response)
        if self.settings.scoring == "cloze":
            texts = tuple(Continuation(option.text, lead=option.lead) for option in question.options)
            return Probe(question.plain, texts, right)
        return Probe(question.prompt, tuple(Continuation(option.response) for option in question.options), right)

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and log p of every continuation (rows, options) or the generated tokens (rows, 32)."""
        log_probs, _ = teacher_forced(model, batch)
        loss = response_loss(log_probs, batch)
        if self.settings.scoring == "generation":
            return loss, generate(model, batch, WRITTEN)
        return loss, log_probs.sum(-1)

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The accuracy: the unweighted mean over the tasks of a suite, which also has "accuracy.boolq" and so on."""
        if self.settings.scoring == "generation":
            texts = processor.batch_decode(scores.astype(int), skip_special_tokens=True)
            answers = zip(rows.inputs, texts, strict=True)
            chosen = [extract(question.prompt + text, question.names) for question, text in answers]
        else:
            chosen = [self._likeliest(question, row) for question, row in zip(rows.inputs, scores, strict=True)]
        hits: dict[str, list[bool]] = {}
        for question, label, name in zip(rows.inputs, rows.labels, chosen, strict=True):
            right = next(option.name for option in question.options if option.response == label)
            hits.setdefault(question.group, []).append(name == right)
        accuracies = {f"accuracy.{group}": float(np.mean(found)) for group, found in sorted(hits.items())}
        mean = {"accuracy": float(np.mean(list(accuracies.values())))}
        return mean if len(accuracies) == 1 else {**mean, **accuracies}

    def _likeliest(self, question: ChoiceQuestion, log_probs: np.ndarray) -> str:
        lengths = [1] * len(question.options)
        if self.settings.scoring == "cloze" and question.per_character:
            lengths = [max(1, len(option.text.strip())) for option in question.options]
        values = log_probs[: len(lengths)] / lengths  # a batch is as wide as its row with the most options
        return question.options[int(np.argmax(values))].name


def extract(text: str, names: Sequence[str]) -> str | None:
    """The answer in a text, by the published rule: the first of `names` after "### Response:", case-sensitive.

    A text without these words is an answer as a whole; a second "### Response:" ends the answer. A name inside a longer
    word counts too. None if there is no name, which counts as wrong. Source: the evaluation scripts of LLM-Adapters (Hu
    et al., 2023).
    """
    _, marker, after = text.partition(RESPONSE)
    answer = after.partition(RESPONSE)[0] if marker else text
    found = re.search("|".join(re.escape(name) for name in names), answer)
    return found[0] if found else None
