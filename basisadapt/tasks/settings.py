"""Settings of a task's data, and of how a language model's answers are trained and scored."""

from __future__ import annotations

from dataclasses import dataclass

from basisadapt.core.errors import InputError, require, unknown
from basisadapt.core.settings import late

KINDS = ("classes", "numbers")
SCORINGS = ("likelihood", "generation", "cloze")
MAX_FACTS = 1_000_000
MAX_SYMBOLS = 1_000
HEADS = ("linear", "zero_shot")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The `data.*` settings.

    For the user's own data, a file or a hub data set:

    - `text` (str, default "text"): the column of the texts.
    - `second` (str or None, default None): the column of the second texts, for pairs.
    - `label` (str, default "label"): the column of the labels.
    - `test` (str or None, default None): the file or the split to evaluate on; None holds out one row in five of a
      file.
    - `kind` (str or None, default None): the labels are "classes" or "numbers"; None decides by their values.

    For language models:

    - `train_on_inputs` (bool, default False): the loss covers the prompt too.
    - `scoring` (str, default "likelihood"): how the chosen option is determined: "likelihood", the published answer
      sentence that is most likely; "generation", the first option named in the generated text, the published rule; or
      "cloze", the option whose text is most likely, per character, as a continuation of the question.
    - `max_new_tokens` (int ≥ 1, default 1024): of an answer to MT-Bench.

    For images:

    - `head` (str, default "linear"): "linear", a trained layer; or "zero_shot", frozen embeddings of sentences about
      the classes, for a backbone with a text tower (CLIP).

    For single tasks:

    - `facts` (int in [1, 1000000], default 1024): the number of facts in the tasks facts and phone_book, of words in
      dictionary/..., and of the strings that cipher/... and modular/... train on.
    - `probes` (int in [0, 1000000], default 0): the number of real texts on which the tasks facts and phone_book also
      measure what is forgotten.
    - `symbols` (int in [2, 1000], default 59): the number of letters in the tasks cipher/..., and the modulus in
      modular/..., a prime for arithmetic in a field.
    - `packed` (bool, default False): for completion tasks, pack the training rows of a batch end to end into sequences
      of the longest row's length, with little padding; each row attends only to itself.

    Raises InputError for a value out of range.
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
    probes: int = late(0)
    symbols: int = late(59)

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "data.max_new_tokens", self.max_new_tokens, "at least 1")
        for name, least, most in (("facts", 1, MAX_FACTS), ("probes", 0, MAX_FACTS), ("symbols", 2, MAX_SYMBOLS)):
            value = getattr(self, name)
            require(least <= value <= most, f"data.{name}", value, f"at least {least} and at most {most:,}")
        if self.kind is not None and self.kind not in KINDS:
            raise unknown("data.kind", self.kind, KINDS)
        if self.scoring not in SCORINGS:
            raise unknown("data.scoring", self.scoring, SCORINGS)
        if self.head not in HEADS:
            raise unknown("data.head", self.head, HEADS)
        if self.text == self.label or self.second in (self.text, self.label):
            raise InputError(f"data.text, data.second and data.label must name different columns, got {self.label!r}")
