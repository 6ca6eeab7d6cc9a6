"""Rows of the commonsense tasks in their published forms, and files of them."""

from __future__ import annotations

import json

from basisadapt.tasks import commonsense_prompts as prompts
from basisadapt.tasks.commonsense import SOURCES

TRUE_FALSE, SOLUTIONS, ANSWERS, ENDINGS, FILLINGS = prompts.LAYOUTS

# One instruction of each layout, its question and its options, typed after the published form.
WRITTEN = {
    TRUE_FALSE: (
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false",
        "is ice cold?",
        (),
    ),
    SOLUTIONS: (
        "Please choose the correct solution to the question: cool a drink\n\nSolution1: add ice \n\n"
        "Solution2: add fire\n\nAnswer format: solution1/solution2",
        "cool a drink",
        ("add ice ", "add fire"),
    ),
    ANSWERS: (
        "Please choose the correct answer to the question: What is cold?\n\nAnswer1: ice Answer2: fire Answer3: "
        "Answer2: \n\nAnswer format: answer1/answer2/answer3",
        "What is cold?",
        ("ice", "fire", "Answer2: "),
    ),
    ENDINGS: (
        "Please choose the correct ending to complete the given sentence: Skating: She falls. She\n\nEnding1: gets up. "
        "Ending2: melts. Ending3: , a cat, sings. Ending4: \n\nAnswer format: ending1/ending2/ending3/ending4",
        "Skating: She falls. She",
        ("gets up.", "melts.", ", a cat, sings.", ""),
    ),
    FILLINGS: (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ice cools tea, as _ is "
        "cold.\n\nOption1: ice Option2: tea Answer format: option1/option2",
        "Ice cools tea, as _ is cold.",
        ("ice", "tea"),
    ),
}


def written_row(layout, right):
    instruction, name = WRITTEN[layout][0], layout.names[right]
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {name}", "answer": name}


LAYOUT_OF = {source.folder: source.layout for source in SOURCES.values()}


def write(data_dir, folder, part="train", count=4, rows=None):
    """A file of `count` rows of a folder's layout, whose first option is right in every second."""
    rows = rows or [written_row(LAYOUT_OF[folder], number % 2) for number in range(count)]
    path = data_dir / "commonsense" / folder / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
