"""Reads and writes the published instructions of the eight commonsense tasks, in pure functions.

An instruction consists of an opening, the question, the options, and the format of the answer. Source: the data of
LLM-Adapters (Hu et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from basisadapt.core.errors import InputError
from basisadapt.tasks.choice import ChoiceQuestion, Option
from basisadapt.tasks.instructions import alpaca_prompt

BLANK = "_"  # winogrande's


def answer_sentence(name: str) -> str:
    """The published response that chooses the option of that name."""
    return f"the correct answer is {name}"


@dataclass(frozen=True)
class Layout:
    """The form of the instructions of one kind of task, and of their plain questions.

    - `opening` (str): the words before the question.
    - `names`: the possible names of the options.
    - `listed` (bool, default True): the instruction lists the options, each after its name.
    - `between` (str, default " "): separates the options.
    - `before_format` (str): separates the options from the format of the answer.
    - `plain` (str, default "question"): "question"; "sentence", which an option continues; or "blank", which an option
      fills.
    """

    opening: str
    names: tuple[str, ...]
    listed: bool = True
    between: str = " "
    before_format: str = "\n\n"
    plain: str = "question"

    def render(self, question: str, options: Sequence[str]) -> str:
        """The instruction. options: their texts, in order; none where they are not listed.

        Raises InputError for more options than have names.
        """
        if len(options) > len(self.names):
            raise InputError(f"there are {len(options)} options, but names for only {len(self.names)}")
        labeled = [f"{name.capitalize()}: {text}" for name, text in zip(self.names, options, strict=False)]
        listing = f"\n\n{self.between.join(labeled)}" if self.listed else ""
        names = self.names[: len(options)] if self.listed else self.names
        return f"{self.opening}{question}{listing}{self.before_format}Answer format: {'/'.join(names)}"

    def parse(self, instruction: str) -> tuple[str, tuple[str, ...]]:
        """The question and the texts of the options. Raises InputError for anything that `render` does not write."""
        body, _, written = instruction.removeprefix(self.opening).rpartition(f"{self.before_format}Answer format: ")
        names, texts = written.split("/"), list[str]()
        if self.listed:
            for name in reversed(names):  # from the end: a question may hold anything
                separator = "\n\n" if name == self.names[0] else self.between
                body, _, text = body.rpartition(f"{separator}{name.capitalize()}: ")
                texts.insert(0, text)
        if not self.opens(instruction) or self.render(body, texts) != instruction:
            raise InputError(f"the instruction is not one of the published form {self._form()!r}")
        return body, tuple(texts)

    def opens(self, instruction: str) -> bool:
        """Whether the instruction begins with the opening of this layout."""
        return instruction.startswith(self.opening)

    def _form(self) -> str:
        return self.render("...", ["..."] * min(3, len(self.names)) if self.listed else [])

    def question(self, instruction: str, group: str) -> ChoiceQuestion:
        """The question that a task asks with the instruction; group: the task. Raises InputError as `parse`.

        The plain form, for "cloze", is one of:

        - "Question: ...\\nAnswer:" and an option, where yes and no stand for true and false;
        - the sentence of HellaSwag and an ending;
        - Winogrande's sentence with an option in its blank, where only the words after the blank are scored (Trinh &
          Le, 2018).

        Log-probabilities are per character, except if the options are yes and no, or the scored words are the same.
        """
        question, texts = self.parse(instruction)
        names = self.names[: len(texts)] if self.listed else self.names
        plain, options = self._plain(question, texts)
        return ChoiceQuestion(
            prompt=alpaca_prompt(instruction),
            group=group,
            names=self.names,
            plain=plain,
            options=tuple(
                Option(name, answer_sentence(name), text, lead)
                for name, (lead, text) in zip(names, options, strict=True)
            ),
            per_character=self.listed and self.plain != "blank",
        )

    def _plain(self, question: str, texts: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
        """The plain question, and the lead and text of every option. Raises InputError for a missing blank."""
        if self.plain == "blank":
            before, blank, after = question.partition(BLANK)
            if not blank:
                raise InputError(f"the sentence has no blank, {BLANK!r}")
            gap = " " if before.endswith(" ") else ""  # belongs to the option's first token
            return before.rstrip(), [(gap + text, after) for text in texts]
        if not self.listed:
            texts = ("yes", "no")
        plain = question if self.plain == "sentence" else f"Question: {question}\nAnswer:"
        return plain, [("", f" {text}") for text in texts]


def _numbered(noun: str, count: int) -> tuple[str, ...]:
    return tuple(f"{noun}{number}" for number in range(1, count + 1))


TRUE_FALSE = Layout(
    "Please answer the following question with true or false, question: ", ("true", "false"), listed=False
)
SOLUTIONS = Layout("Please choose the correct solution to the question: ", _numbered("solution", 2), between="\n\n")
ANSWERS = Layout("Please choose the correct answer to the question: ", _numbered("answer", 5))
ENDINGS = Layout(
    "Please choose the correct ending to complete the given sentence: ", _numbered("ending", 4), plain="sentence"
)
FILLINGS = Layout(
    "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    _numbered("option", 2),
    before_format=" ",
    plain="blank",
)
LAYOUTS = (TRUE_FALSE, SOLUTIONS, ANSWERS, ENDINGS, FILLINGS)


# --- rows of the original data sets: question, texts of the options, index of the correct one ---

Asked = tuple[str, tuple[str, ...], int]


def from_boolq(row: Mapping[str, Any]) -> Asked:
    """A row of google/boolq, without its passage, as published."""
    return f"{row['question']}?", (), 0 if row["answer"] else 1


def from_piqa(row: Mapping[str, Any]) -> Asked:
    """A row of ybisk/piqa: the goal and two solutions."""
    return row["goal"], (row["sol1"], row["sol2"]), int(row["label"])


def from_social_i_qa(row: Mapping[str, Any]) -> Asked:
    """A row of allenai/social_i_qa, whose labels count from one."""
    return (
        f"{row['context']} {row['question']}",
        (row["answerA"], row["answerB"], row["answerC"]),
        int(row["label"]) - 1,
    )


def from_hellaswag(row: Mapping[str, Any]) -> Asked:
    """A row of Rowan/hellaswag: the activity before the context, as published."""
    return f"{row['activity_label']}: {row['ctx']}", tuple(row["endings"]), int(row["label"])


def from_winogrande(row: Mapping[str, Any]) -> Asked:
    """A row of allenai/winogrande, whose answers count from one."""
    return row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1


def from_arc(row: Mapping[str, Any]) -> Asked:
    """A row of allenai/ai2_arc, whose labels are letters or digits."""
    return row["question"], tuple(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"])


def from_openbookqa(row: Mapping[str, Any]) -> Asked:
    """A row of allenai/openbookqa, whose labels are letters."""
    return row["question_stem"], tuple(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"])


def from_subset(row: Mapping[str, Any]) -> Asked:
    """A row of a HellaSwag subset with lettered choices. It has no activity, so the sentence is only the context."""
    return row["question"], tuple(row["choices"].values()), list(row["choices"]).index(row["answer"])
