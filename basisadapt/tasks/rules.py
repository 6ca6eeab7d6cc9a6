"""Between facts and language: strings whose answers follow from a rule. Is it stored, or learned?"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from basisadapt.core.errors import require
from basisadapt.tasks.facts import KEY, WORDS, Facts, PhoneBook, StoredTask
from basisadapt.tasks.task import Rows, TaskData


class RuleTask(StoredTask):
    """data.facts strings over an alphabet of data.symbols words, drawn without repetition, with answers by a rule.

    As many others, or all that are left, are never trained on but asked. An answer is one of data.symbols classes.
    "bits" and "recall" are those of the strings that are trained on, the bits counted as if no answer followed from
    others. One metric more:

    - "held_out": the share of right answers to the others: 1 for a rule that is learned, and chance, about
      1 / data.symbols, where answers are only stored.
    """

    @property
    def num_labels(self) -> int:
        """The number of symbols."""
        return self.settings.symbols

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of different strings."""

    @abstractmethod
    def strings(self, numbers: np.ndarray) -> np.ndarray:
        """The strings with these numbers, which are below `count`: symbols (rows, letters)."""

    @abstractmethod
    def rule(self, strings: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The classes (rows, answers) of strings of symbols (rows, letters), both numbers below data.symbols."""

    @property
    def drawn_as(self) -> str:
        """The numbers of strings, letters and symbols, and the class."""
        facts, letters = self.settings.facts, self.read[0]
        return f"{facts} strings of {letters} of {self.num_labels} symbols: {type(self).__name__}"

    def check(self, data_dir: Path | None) -> None:
        """Raise InputError if there are fewer strings than data.facts, or texts than data.probes."""
        super().check(data_dir)
        facts, there = self.settings.facts, f"the strings that there are of {self.num_labels} symbols (data.symbols)"
        require(facts <= self.count, "data.facts", facts, f"at most {self.count}, {there}")

    def draw(self, generator: np.random.Generator) -> Rows:
        """Strings, those that are trained on first, and their classes."""
        asked = min(2 * self.settings.facts, self.count)
        strings = self.strings(generator.choice(self.count, size=asked, replace=False))
        # Numbers that follow each other stand for different words of a vocabulary, whatever its size.
        words = generator.integers(WORDS - self.num_labels) + generator.permutation(self.num_labels)
        return self.rows(words[strings], self.rule(strings, generator))

    def of_seed(self, seed: int, data_dir: Path | None = None) -> TaskData:
        """The strings that are trained on; to evaluate, also the others. Raises InputError as `check`."""
        self.check(data_dir)
        data = super().of_seed(seed, data_dir)
        return replace(data, train=data.train.head(self.settings.facts))

    def _stored(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        count = self.settings.facts
        stored = super()._stored(logits[:count], rows.head(count))
        if len(rows) <= count:
            return stored
        right = logits[count:].argmax(dim=-1) == torch.tensor(rows.labels[count:])
        return {**stored, "held_out": right.double().mean().item()}


class Modular(RuleTask):
    """Pairs of numbers a ≤ b below p = data.symbols: else a pair that is held out could be known from its mirror.

    Source: Power et al. (2022), Grokking.
    """

    read = (2, 1)

    @property
    def count(self) -> int:
        """p (p + 1) / 2."""
        return self.num_labels * (self.num_labels + 1) // 2

    def strings(self, numbers: np.ndarray) -> np.ndarray:
        """The pairs with these numbers, (rows, 2)."""
        return cast(np.ndarray, np.stack(np.triu_indices(self.num_labels), axis=1)[numbers])


class Add(Modular):
    """a + b mod p."""

    def rule(self, strings: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The sums, (rows, 1)."""
        return cast(np.ndarray, strings.sum(axis=1, keepdims=True) % self.num_labels)


class Multiply(Modular):
    """a · b mod p."""

    def rule(self, strings: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The products, (rows, 1)."""
        return cast(np.ndarray, strings.prod(axis=1, keepdims=True) % self.num_labels)


class Unruled(Modular):
    """A class at random: the control, where nothing follows from anything."""

    def rule(self, strings: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Independent classes, (rows, 1)."""
        return generator.integers(self.num_labels, size=(len(strings), 1))


class Cipher(RuleTask):
    """Strings of four letters, each of which stands for another one, by one permutation of the alphabet."""

    read = (KEY, KEY)

    @property
    def count(self) -> int:
        """Those of four letters."""
        return int(self.num_labels**KEY)

    def strings(self, numbers: np.ndarray) -> np.ndarray:
        """The strings with these numbers, (rows, 4)."""
        return np.stack(np.unravel_index(numbers, (self.num_labels,) * KEY), axis=1)

    def rule(self, strings: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The encrypted strings, (rows, 4)."""
        return cast(np.ndarray, generator.permutation(self.num_labels)[strings])


class AddStates(Add, Facts, name="modular/add/states"):
    """a + b mod p = data.symbols, of words for a and b, in the model of `facts`; pairs are held out."""


class AddText(Add, PhoneBook, name="modular/add/text"):
    """a + b mod p = data.symbols, of words for a and b, in the model of `phone_book`; pairs are held out."""


class MultiplyStates(Multiply, Facts, name="modular/multiply/states"):
    """a · b mod p = data.symbols, of words for a and b, in the model of `facts`; pairs are held out."""


class MultiplyText(Multiply, PhoneBook, name="modular/multiply/text"):
    """a · b mod p = data.symbols, of words for a and b, in the model of `phone_book`; pairs are held out."""


class UnruledStates(Unruled, Facts, name="modular/random/states"):
    """The control of `modular/add/states`: a class at random for every pair."""


class UnruledText(Unruled, PhoneBook, name="modular/random/text"):
    """The control of `modular/add/text`: a class at random for every pair."""


class CipherStates(Cipher, Facts, name="cipher/states"):
    """Strings of four words, each of which stands for another one of data.symbols, in the model of `facts`, asked for
    what the first word stands for; strings are held out."""


class CipherText(Cipher, PhoneBook, name="cipher/text"):
    """Strings of four words, each of which stands for another one of data.symbols, in the model of `phone_book`, which
    writes the encrypted string; strings are held out."""
