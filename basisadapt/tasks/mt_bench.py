"""MT-Bench (Zheng et al., 2023): two-turn questions, the prompts for their judge, and the scores in its answers.

It needs three files that FastChat publishes (`fastchat/llm_judge/data`), in the folder `instruct/` of the data folder:
mt_bench_question.jsonl, judge_prompts.jsonl and mt_bench_reference_gpt-4.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from basisadapt.core.errors import InputError, refusing, unknown
from basisadapt.core.grouping import grouped
from basisadapt.tasks.asking import ask_all
from basisadapt.tasks.judge import Judge, Message
from basisadapt.tasks.task import Rows, readable_folder

QUESTIONS, PROMPTS, REFERENCES = "mt_bench_question.jsonl", "judge_prompts.jsonl", "mt_bench_reference_gpt-4.jsonl"
TEMPERATURES = {  # of the answers, by category of question, as published
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("reasoning", "math", "coding")  # categories for which the judge gets a reference answer
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")

T = TypeVar("T")
Turns = tuple[str, str]


@dataclass(frozen=True)
class BenchQuestion:
    """A question of two turns; the second is asked after the answer to the first.

    - `number` (int): its id in MT-Bench.
    - `category` (str): a key of TEMPERATURES.
    - `turns`: the texts of both turns.
    """

    number: int
    category: str
    turns: Turns

    @property
    def temperature(self) -> float:
        """The temperature at which the question is answered; 0 is greedy."""
        return TEMPERATURES[self.category]


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for the judge.

    - `system` (str): the system message.
    - `template` (str): the user message, with named fields in braces.
    """

    system: str
    template: str

    def messages(self, fields: Mapping[str, str]) -> list[Message]:
        """The messages with the template filled in. Raises KeyError for a field that `fields` lacks."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.template.format_map(fields)},
        ]


@dataclass(frozen=True)
class Grading:
    """How the answers to a question are judged.

    - `prompts`: a prompt for each turn.
    - `references`: the reference answers of both turns, or None.
    """

    prompts: tuple[JudgePrompt, JudgePrompt]
    references: Turns | None

    def messages(self, question: BenchQuestion, answers: Turns) -> tuple[list[Message], list[Message]]:
        """The messages to the judge about the first answer, and those about the second. Raises KeyError."""
        fields = {"question": question.turns[0], "answer": answers[0]}
        for turn in (0, 1):
            fields[f"question_{turn + 1}"] = question.turns[turn]
            fields[f"answer_{turn + 1}"] = answers[turn]
            if self.references is not None:
                fields[f"ref_answer_{turn + 1}"] = self.references[turn]
        first, second = self.prompts
        return first.messages(fields), second.messages(fields)


# --- judging ---


def rating(text: str) -> float | None:
    """The first `[[number]]` in a judgment, the published rule; None if there is none, or it is not in [1, 10]."""
    found = RATING.search(text)
    value = float(found[1]) if found else 0.0
    return value if 1 <= value <= 10 else None


def judged(rows: Rows, answers: Sequence[Turns], judge: Judge) -> dict[str, float]:
    """The metrics of `answers` to the questions of `rows`, from the ratings that `judge` gives for each turn.

    - "score": the mean rating over questions and turns, in [1, 10].
    - "score.turn1", "score.turn2": of each turn; "score.math" and so on: of each category.
    - "unparsable": the number of judgments without a rating, which the means leave out.

    A mean over no ratings is missing. Raises InputError as soon as the judge does not answer.
    """
    asked = [
        message
        for question, grading, turns in zip(rows.inputs, rows.labels, answers, strict=True)
        for message in grading.messages(question, turns)
    ]
    ratings = list(map(rating, ask_all(judge, asked)))
    groups = grouped(
        (name, value)
        for place, value in enumerate(ratings)
        if value is not None
        for name in ("score", f"score.turn{place % 2 + 1}", f"score.{rows.inputs[place // 2].category}")
    )
    return {**{name: fmean(values) for name, values in groups.items()}, "unparsable": float(ratings.count(None))}


# --- files ---


def check_files(data_dir: Path | None) -> None:
    """Raise InputError unless the three files exist."""
    if data_dir is None:
        raise InputError(
            f"MT-Bench needs --data-dir with instruct/{QUESTIONS}, {PROMPTS} and {REFERENCES}, "
            "which FastChat publishes in fastchat/llm_judge/data"
        )
    readable_folder(data_dir)
    for name in (QUESTIONS, PROMPTS, REFERENCES):
        if not (data_dir / "instruct" / name).is_file():
            raise InputError(f"data folder {str(data_dir)!r} has no instruct/{name}")


def read_bench(data_dir: Path | None) -> Rows:
    """The questions, alternating between categories so that the first ones are a fair sample, and their gradings.

    Raises InputError naming file and line.
    """
    check_files(data_dir)
    assert data_dir is not None
    folder = data_dir / "instruct"
    prompts = dict(_parsed(folder / PROMPTS, _named_prompt))
    references = dict(_parsed(folder / REFERENCES, _numbered_turns))
    questions = _interleaved(_parsed(folder / QUESTIONS, _question))
    if not questions or len({question.number for question in questions}) < len(questions):
        raise InputError(f"{folder / QUESTIONS} has {'a question twice' if questions else 'no questions'}")
    return Rows(questions, [_grading(question, prompts, references, folder) for question in questions])


def _grading(
    question: BenchQuestion, prompts: Mapping[str, JudgePrompt], references: Mapping[int, Turns], folder: Path
) -> Grading:
    referenced = question.category in WITH_REFERENCE
    if referenced and question.number not in references:
        raise InputError(f"{folder / REFERENCES} has no answers to question {question.number}")
    names = ("single-math-v1", "single-math-v1-multi-turn") if referenced else ("single-v1", "single-v1-multi-turn")
    for name in names:
        if name not in prompts:
            raise InputError(f"{folder / PROMPTS} has no prompt {name!r}")
    grading = Grading((prompts[names[0]], prompts[names[1]]), references[question.number] if referenced else None)
    try:
        grading.messages(question, ("", ""))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / PROMPTS}: a template of {' and '.join(names)} cannot be filled: {error}"
        ) from error
    return grading


def _interleaved(questions: Sequence[BenchQuestion]) -> list[BenchQuestion]:
    """The first question of every category, then the second of every category, and so on."""
    before: dict[str, int] = {}
    places = []
    for question in questions:
        places.append(before.get(question.category, 0))
        before[question.category] = places[-1] + 1
    return [questions[i] for i in sorted(range(len(questions)), key=lambda i: places[i])]


def _question(entry: Any) -> BenchQuestion:
    number, turns = _numbered(entry, entry["turns"])
    if entry["category"] not in TEMPERATURES:
        raise unknown("category", entry["category"], TEMPERATURES)
    return BenchQuestion(number, entry["category"], turns)


def _numbered_turns(entry: Any) -> tuple[int, Turns]:
    return _numbered(entry, entry["choices"][0]["turns"])


def _numbered(entry: Any, turns: Any) -> tuple[int, Turns]:
    if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)):
        raise InputError("turns must be two texts")
    if type(entry["question_id"]) is not int:
        raise InputError("question_id must be a whole number")
    return entry["question_id"], (turns[0], turns[1])


def _named_prompt(entry: Any) -> tuple[str, JudgePrompt]:
    texts = entry["name"], entry["system_prompt"], entry["prompt_template"]
    if not all(isinstance(text, str) for text in texts):
        raise InputError("name, system_prompt and prompt_template must be texts")
    return entry["name"], JudgePrompt(entry["system_prompt"], entry["prompt_template"])


def _parsed(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """Every line of a JSONL file, parsed by `parse`. Raises InputError naming file and line."""
    with refusing(f"{path} cannot be read", OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [_named(f"{path}, line {number}", line, parse) for number, line in enumerate(lines, 1) if line.strip()]


def _named(where: str, line: str, parse: Callable[[Any], T]) -> T:
    try:
        return parse(json.loads(line))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except KeyError as error:
        raise InputError(f"{where}: {error} is missing") from error
    except (TypeError, IndexError) as error:
        raise InputError(f"{where}: not an entry of this file: {error}") from error


# --- saved answers ---


def save_answers(rows: Rows, answers: Sequence[Turns], folder: Path) -> Path:
    """Save the answers in FastChat's format. Returns the file, named by their hash. Raises InputError on failure."""
    chosen = [
        {"question_id": question.number, "choices": [{"index": 0, "turns": list(turns)}]}
        for question, turns in sorted(zip(rows.inputs, answers, strict=True), key=lambda pair: pair[0].number)
    ]
    name = f"answers-{hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]}"
    path = folder / f"{name}.jsonl"
    half = path.with_name(f"{name}.{uuid.uuid4().hex}.half")  # several processes may save equal answers
    with refusing(f"answers cannot be saved in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        half.write_text("".join(f"{json.dumps({**entry, 'model_id': name})}\n" for entry in chosen), encoding="utf-8")
        half.replace(path)
    return path


def read_answers(path: Path, bench: Rows) -> tuple[Rows, list[Turns]]:
    """The questions of `bench` that a file in FastChat's format answers, and the answers.

    Raises InputError for a malformed line, an unknown question, or a file that answers none.
    """
    answers = dict(_parsed(path, _numbered_turns))
    chosen = [i for i, question in enumerate(bench.inputs) if question.number in answers]
    strangers = answers.keys() - {question.number for question in bench.inputs}
    if strangers or not chosen:
        found = f"question {min(strangers)}, which MT-Bench does not have" if strangers else "no question of MT-Bench"
        raise InputError(f"{path} answers {found}")
    rows = bench.take(chosen)
    return rows, [answers[question.number] for question in rows.inputs]
