"""Questions with options, and three ways to see which option a language model chooses."""

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

WRITTEN = 32  # new tokens that the published scripts let a model write
RESPONSE = "### Response:"


@dataclass(frozen=True)
class Option:
    """An option: its name, such as "answer3", the response that chooses it, and its text.

    lead: what stands between the plain question and the text, and is not scored.
    """

    name: str
    response: str
    text: str
    lead: str = ""


@dataclass(frozen=True)
class ChoiceQuestion(Question):
    """group: the task of a suite whose accuracy it counts for. names: what the published rule looks for in an answer.

    plain: the question without instructions, which the options' texts continue. per_character: whether their
    log-probabilities are divided by their lengths.
    """

    group: str
    names: tuple[str, ...]
    plain: str
    options: tuple[Option, ...]
    per_character: bool


class ChoiceTask(CompletionTask):
    """Inputs are `ChoiceQuestion`s, labels the response of the right option.

    data.scoring says how the model's choice is found. "likelihood": the option whose response has the largest log p
    after the prompt. "cloze": the option whose text has the largest log p as a continuation of the plain question, per
    character where the question says so. "generation": the first name in up to 32 greedily written tokens
    (`extract`); of the published scripts, one searches with four beams instead. eval_loss is the mean loss per token of
    the right text: in "cloze" the option's, else the response.
    """

    headline = "accuracy"

    def probe(self, question: ChoiceQuestion, response: str) -> Probe:
        """The responses after the prompt, the texts after the plain question, or the right response alone."""
        if self.settings.scoring == "generation":
            return Probe(question.prompt, (Continuation(response, ends=True),))
        right = [option.response for option in question.options].index(response)
        if self.settings.scoring == "cloze":
            texts = tuple(Continuation(option.text, lead=option.lead) for option in question.options)
            return Probe(question.plain, texts, right)
        return Probe(question.prompt, tuple(Continuation(option.response) for option in question.options), right)

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss; log p of every continuation, shape (rows, options), or the tokens written, (rows, 32)."""
        log_probs, _ = teacher_forced(model, batch)
        loss = response_loss(log_probs, batch)
        if self.settings.scoring == "generation":
            return loss, generate(model, batch, WRITTEN)
        return loss, log_probs.sum(-1)

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The accuracy, in a suite of every task ("accuracy.boolq", ...) and as the tasks' unweighted mean."""
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
    """The answer in a text, by the published rule: the first of `names` after "### Response:", in their case.

    A text without those words is an answer as a whole; where they come again, the answer ends. A name counts also
    inside a longer word. None where there is no name, which counts as wrong. Source: the evaluation scripts of
    LLM-Adapters (Hu et al., 2023).
    """
    _, marker, after = text.partition(RESPONSE)
    answer = after.partition(RESPONSE)[0] if marker else text
    found = re.search("|".join(re.escape(name) for name in names), answer)
    return found[0] if found else None
