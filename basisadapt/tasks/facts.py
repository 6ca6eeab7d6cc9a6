"""Random facts: how many bits can an adapter store?"""

from __future__ import annotations

import functools
import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from basisadapt.core.errors import require
from basisadapt.tasks.completion import IGNORED
from basisadapt.tasks.docstrings import Docstrings
from basisadapt.tasks.drawn import DrawnTask
from basisadapt.tasks.settings import DataSettings
from basisadapt.tasks.task import Example, Rows, TaskData

KEY = 4  # words of a key
CLASSES = 256
VALUE = 8  # words of a value in a phone book
SENTENCES = 4  # in which a made-up word is seen
WORDS = 2**31  # a word is given by a number below, see `bert_parts.FeedForwardInputs` and `last_mlp.MLPInputs`


class StoredTask(DrawnTask):
    """data.facts keys of four random words, and for each an answer that is independent of all others.

    The metrics are:

    - "bits": the bits stored, n · (log₂ C − H), for n answers drawn uniformly from C classes, 256 here, with their mean
      cross-entropy H in bits.
    - "recall": the share of keys whose classes all are the likeliest ones.

    With data.probes, evaluation also reads so many real texts, docstrings of Python's library, and asks what is left of
    what the model made of them. The distribution over the classes is p* before training, and p after:

    - "forgotten": the mean of KL(p* ‖ p), in bits.
    - "kept": the share of answers whose likeliest class is still the same.

    The states below the part that trains are computed once. Source of the measure: Morris et al. (2025), How Much Do
    Language Models Memorize?
    """

    headline, read = "bits", (KEY, VALUE)  # of a text, the tokens that are only read, and those that are predicted

    def __init__(self, settings: DataSettings | None = None) -> None:
        super().__init__(settings)
        self._known: dict[Any, Tensor] = {}

    @property
    def num_labels(self) -> int:
        """The number of classes."""
        return CLASSES

    @property
    @abstractmethod
    def unknown(self) -> Any:
        """The label of a text that is no fact: classes that no loss counts."""

    @abstractmethod
    def rows(self, keys: np.ndarray, classes: np.ndarray) -> Rows:
        """The rows of keys, numbers of words (rows, words), and classes (rows, answers), in the form's labels."""

    @abstractmethod
    def hidden(self, inputs: Sequence[Sequence[int]], processor: Any) -> Tensor:
        """The inputs of the part that trains, one row for each of `inputs`."""

    @abstractmethod
    def answers(self, label: Any) -> Example:
        """The entries of a row's example that hold its right classes."""

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError if there are fewer texts than data.probes."""
        if self.settings.probes:
            _texts("eval", "probes", self.settings.probes)

    def of_seed(self, seed: int, data_dir: Path | None = None) -> TaskData:
        """The facts; to evaluate on, also the texts."""
        data = super().of_seed(seed, data_dir)
        if not self.settings.probes:
            return data
        texts = _texts("eval", "probes", self.settings.probes)
        asked = Rows([*data.eval.inputs, *texts], [*data.eval.labels, *[self.unknown] * len(texts)])
        return TaskData(data.train, asked, mark=f"{data.mark}, texts {_digest(texts)}")

    def examples(self, rows: Rows, processor: Any, max_length: int | None, training: bool) -> Sequence[Example]:
        """The hidden states, computed once for each input, and the answers; to evaluate with texts, also what the part
        that trains makes of the states before training."""
        inputs = [one if isinstance(one, str) else tuple(one) for one in rows.inputs]
        new = [one for one in dict.fromkeys(inputs) if one not in self._known]
        if keys := [one for one in new if not isinstance(one, str)]:
            self._known.update(zip(keys, self.hidden(keys, processor), strict=True))
        if texts := [one for one in new if isinstance(one, str)]:
            self._known.update(zip(texts, processor.read(texts, *self.read), strict=True))
        pairs = zip(inputs, rows.labels, strict=True)
        examples = [{"hidden": self._known[one], **self.answers(label)} for one, label in pairs]
        if training or not self.settings.probes:
            return examples
        return [{**example, "before": processor.above(example["hidden"])} for example in examples]

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss and the logits; with texts, the logits after and before training, shape (rows, 2, ..., 256)."""
        if "before" not in batch:
            return super().score(model, batch)
        output = model(**{name: value for name, value in batch.items() if name != "before"})
        before = batch["before"] @ getattr(model, "module", model).classes.T  # DDP wraps a model
        return output.loss, torch.stack([output.logits.float(), before], dim=1)

    def measure(self, scores: np.ndarray, rows: Rows, processor: Any) -> dict[str, float]:
        """The metrics, from logits of shape (rows, 256) or (rows, answers, 256), or with texts as `score` has them."""
        logits = torch.from_numpy(scores).double()
        if not self.settings.probes:
            return self._stored(logits, rows)
        asked = torch.tensor([label == self.unknown for label in rows.labels])
        facts = rows.take((~asked).nonzero().flatten().tolist())
        after, before = logits[asked].log_softmax(dim=-1).unbind(1)
        divergence = (before.exp() * (before - after)).sum(dim=-1).mean().item() / math.log(2)
        same = (after.argmax(dim=-1) == before.argmax(dim=-1)).double().mean().item()
        return {**self._stored(logits[~asked, 0], facts), "forgotten": divergence, "kept": same}

    def _stored(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        """Bits and recall."""
        labels = torch.tensor(rows.labels)
        entropy = cross_entropy(logits.flatten(0, -2), labels.flatten()).item() / math.log(2)
        known = (logits.argmax(dim=-1) == labels).view(len(rows), -1).all(dim=1)
        bits = labels.numel() * (math.log2(self.num_labels) - entropy)
        return {"bits": bits, "recall": known.double().mean().item()}


class Facts(StoredTask, name="facts"):
    """A class for each key.

    The model is a BERT's last feed-forward block, read at the first token through a frozen random classifier.
    """

    form, unknown = "feed_forward", IGNORED

    @property
    def drawn_as(self) -> str:
        """The number of facts and their form."""
        return f"{self.settings.facts} facts: keys of {KEY} words, {CLASSES} classes"

    def draw(self, generator: np.random.Generator) -> Rows:
        """Keys, as numbers of words, and classes."""
        keys = generator.integers(WORDS, size=(self.settings.facts, KEY))
        return self.rows(keys, generator.integers(CLASSES, size=(self.settings.facts, 1)))

    def rows(self, keys: np.ndarray, classes: np.ndarray) -> Rows:
        """Keys, and the first class of each."""
        return Rows(keys.tolist(), classes[:, 0].tolist())

    def hidden(self, inputs: Sequence[Sequence[int]], processor: Any) -> Tensor:
        """The first token's hidden state, shape (rows, hidden)."""
        return cast(Tensor, processor(inputs))

    def answers(self, label: Any) -> Example:
        """The class, as "labels"."""
        return {"labels": label}


class VectorFacts(Facts, name="facts/vectors"):
    """As `facts`, a class for each of data.facts random vectors.

    The model is an MLP with random weights, of as many layers as the backbone says, all of them adapted.
    """

    form = "random_mlp"

    @property
    def drawn_as(self) -> str:
        """The number of facts and their form."""
        return f"{self.settings.facts} facts: {CLASSES} classes of random vectors"

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError for data.probes, which are texts."""
        probes = self.settings.probes
        require(not probes, "task 'facts/vectors' reads no texts: data.probes", probes, "0")


class PhoneBook(StoredTask, name="phone_book"):
    """A value of eight words for each key: a number in a phone book whose digits are 256 words.

    The model is a language model's last MLP, read through its own norm and the head's rows of the 256 words, so that it
    need not learn which words can occur. Each word of a value is predicted from the key and the words before it: a
    recalled value is one that the model would write. Source of the form: Understanding LoRA as Knowledge Memory
    (2026), PhoneBook.
    """

    form = "last_mlp"

    @property
    def unknown(self) -> list[int]:
        """Classes that no loss counts."""
        return [IGNORED] * self.read[1]

    @property
    def drawn_as(self) -> str:
        """The number of facts and their form."""
        return f"{self.settings.facts} facts: keys of {KEY} words, values of {VALUE} of {CLASSES} words"

    def draw(self, generator: np.random.Generator) -> Rows:
        """Keys, as numbers of words, and values."""
        keys = generator.integers(WORDS, size=(self.settings.facts, KEY))
        values = generator.integers(CLASSES, size=(self.settings.facts, VALUE))
        return self.rows(keys, values)

    def rows(self, keys: np.ndarray, classes: np.ndarray) -> Rows:
        """Keys with their values behind them, and values."""
        return Rows(np.concatenate([keys, classes], axis=1).tolist(), classes.tolist())

    def hidden(self, inputs: Sequence[Sequence[int]], processor: Any) -> Tensor:
        """The residual stream before each word of a value, shape (rows, words of a value, hidden)."""
        key = self.read[0]
        return cast(Tensor, processor([one[:key] for one in inputs], [one[key:] for one in inputs], self.num_labels))

    def answers(self, label: Any) -> Example:
        """The classes of the value, as "words"; "labels", which every row needs, is 0."""
        return {"words": torch.tensor(label), "labels": 0}


class OfTexts(StoredTask):
    """Facts about data.facts real texts, docstrings of Python's library."""

    def texts(self) -> list[str]:
        """The texts. Raises InputError if there are fewer."""
        return _texts("train", "facts", self.settings.facts)

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError if there are fewer texts than data.facts or data.probes."""
        super().check(data_dir)
        self.texts()


class TextFacts(OfTexts, Facts, name="facts/texts"):
    """As `facts`, a class for each of data.facts real texts, docstrings of Python's library, at random."""

    @property
    def drawn_as(self) -> str:
        """The number of facts and their form."""
        return f"{self.settings.facts} facts: {CLASSES} classes of texts {_digest(self.texts())}"

    def draw(self, generator: np.random.Generator) -> Rows:
        """The texts, the same for every seed, and classes."""
        return Rows(self.texts(), generator.integers(CLASSES, size=self.settings.facts).tolist())


class Edits(OfTexts, PhoneBook, name="edits"):
    """Edits of what a language model says: for each of data.facts real texts, docstrings of Python's library, another
    next word after their first eleven tokens, one of 256 at random, in the model of `phone_book`.

    With data.probes, "kept" tells how specific the edits are. Source of the question: Meng et al. (2022), Locating and
    Editing Factual Associations in GPT, whose facts are of people and places.
    """

    read = (KEY + VALUE - 1, 1)

    @property
    def drawn_as(self) -> str:
        """The number of edits and their form."""
        return f"{self.settings.facts} edits: next words of {CLASSES} of texts {_digest(self.texts())}"

    def draw(self, generator: np.random.Generator) -> Rows:
        """The texts, the same for every seed, and the words."""
        return Rows(self.texts(), generator.integers(CLASSES, size=(self.settings.facts, 1)).tolist())


class DictionaryTask(StoredTask):
    """A made-up language of data.facts words, each of two real words, with a translation, one of 256 classes.

    A word is seen in four sentences, after two random words, and asked in another one: between random facts, where
    nothing follows from anything, and a rule. "bits" are those of the translations that are known in a new sentence.
    """

    def draw(self, generator: np.random.Generator) -> Rows:
        """Keys of all sentences, five for each word, and translations."""
        count, parts = self.settings.facts, KEY // 2
        words, classes = generator.integers(WORDS, size=(count, parts)), generator.integers(CLASSES, size=count)
        contexts = generator.integers(WORDS, size=(SENTENCES + 1, count, KEY - parts))
        keys = np.concatenate([contexts, np.broadcast_to(words, (SENTENCES + 1, count, parts))], axis=2)
        return self.rows(keys.reshape(-1, KEY), np.tile(classes, SENTENCES + 1)[:, None])

    @property
    def drawn_as(self) -> str:
        """The number of words and their form."""
        return f"{self.settings.facts} words in {SENTENCES} sentences of {KEY} words each, {CLASSES} classes"

    def of_seed(self, seed: int, data_dir: Path | None = None) -> TaskData:
        """The sentences of each word that are seen, and the one that is asked."""
        data, seen = super().of_seed(seed, data_dir), SENTENCES * self.settings.facts
        asked = Rows(data.eval.inputs[seen:], data.eval.labels[seen:])
        return replace(data, train=data.train.head(seen), eval=asked)


class DictionaryStates(DictionaryTask, Facts, name="dictionary/states"):
    """A made-up language of data.facts words, in the model of `facts`."""


class DictionaryText(DictionaryTask, PhoneBook, name="dictionary/text"):
    """A made-up language of data.facts words, in the model of `phone_book`: a translation is the word that follows."""

    read = (KEY, 1)


def _texts(part: str, setting: str, count: int) -> list[str]:
    """The first `count` texts of a part of `docstrings` with as many words as a key and a value, or more, that begin
    with different words, as many as a key has.

    part: "train" or "eval". Raises InputError, which names the setting, if there are fewer.
    """
    found: dict[tuple[str, ...], str] = {}
    for text in getattr(_docstrings(), part).inputs:
        words = text.split()
        if len(words) >= KEY + VALUE:
            found.setdefault(tuple(words[:KEY]), text)
    require(count <= len(found), f"data.{setting}", count, f"at most {len(found)}, the texts that there are")
    return list(found.values())[:count]


@functools.cache
def _docstrings() -> TaskData:
    return Docstrings().load(None)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(repr(list(texts)).encode()).hexdigest()[:16]
