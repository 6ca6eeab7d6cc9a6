"""How a task's data are read, and how a language model's answers are trained and scored."""

from __future__ import annotations

from dataclasses import dataclass

from basisadapt.core.errors import InputError, unknown
from basisadapt.core.settings import late

KINDS = ("classes", "numbers")
SCORINGS = ("likelihood", "generation", "cloze")
MOST_FACTS = 1_000_000
HEADS = ("linear", "zero_shot")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The `data.*` settings. Raises InputError out of range.

    Of your own data (a file or a hub data set): text, second, label are columns, second for pairs of texts; test is the
    file or the split of the rows to evaluate on, where None holds out one row in five of a file. kind: whether labels
    are "classes" or "numbers"; None lets them say it themselves.

    Of language models: train_on_inputs, whether the loss covers the prompt too. scoring, how an answer among options is
    found: "likelihood", the published answer sentence that the model finds likeliest; "generation", the first option
    named in what it writes, the published rule; "cloze", the option whose text it finds likeliest, per character, as
    the question's continuation. max_new_tokens: of an answer to MT-Bench. packed: whether the training rows of a batch
    are laid end to end in sequences of the longest one's length, where each reads itself alone: little is padded.

    Of images: head, "linear", a layer that is trained; or "zero_shot", the embeddings of sentences about the classes,
    which stay as they are, for a backbone with a text tower (CLIP).

    Of the tasks facts and phone_book: facts, how many there are, from 1 to 1,000,000.
    """

    text: str = "text"
    second: str | None = None
    label: str = "label"
    test: str | None = None
    kind: str | None = None
    train_on_inputs: bool = False
    scoring: str = "likelihood"
    max_new_tokens: int = 1024
    head: str = "linear"
    facts: int = late(1024)
    packed: bool = late(False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"data.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 1 <= self.facts <= MOST_FACTS:
            raise InputError(f"data.facts must be at least 1 and at most {MOST_FACTS:,}, got {self.facts}")
        if self.kind is not None and self.kind not in KINDS:
            raise unknown("data.kind", self.kind, KINDS)
        if self.scoring not in SCORINGS:
            raise unknown("data.scoring", self.scoring, SCORINGS)
        if self.head not in HEADS:
            raise unknown("data.head", self.head, HEADS)
        if self.text == self.label or self.second in (self.text, self.label):
            raise InputError(f"data.text, data.second and data.label must name different columns, got {self.label!r}")
