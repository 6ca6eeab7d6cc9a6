"""Small files in the layouts of Alpaca and MT-Bench."""

from __future__ import annotations

import json

from basisadapt.tasks.mt_bench import PROMPTS, QUESTIONS, REFERENCES


def write_bench(folder, first=81, copies=1):
    """Two questions of writing and one of math, whose judge sees a reference, that many times. Returns `folder`."""
    place = folder / "instruct"
    place.mkdir(parents=True, exist_ok=True)
    questions, references = [], []
    for number in range(first, first + 100 * copies, 100):
        asked = {number: ("writing", "Write"), number + 1: ("writing", "Write"), number + 30: ("math", "Add")}
        questions += [
            {"question_id": i, "category": category, "turns": [f"{verb} {i}.", "Again."]}
            for i, (category, verb) in asked.items()
        ]
        references.append({"question_id": number + 30, "choices": [{"turns": ["one", "two"]}]})
    templates = {
        "single-v1": "Q: {question} A: {answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1": "Q: {question} R: {ref_answer_1} A: {answer}",
        "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}",
    }
    prompts = [{"name": n, "system_prompt": n, "prompt_template": template} for n, template in templates.items()]
    for name, entries in ((QUESTIONS, questions), (PROMPTS, prompts), (REFERENCES, references)):
        (place / name).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return folder


def write_alpaca(folder, count=100, name="alpaca_data.json"):
    """Rows with and without input. Returns `folder`."""
    rows = [{"instruction": f"Say {i}.", "input": str(i) * (i % 2), "output": f"It is {i}."} for i in range(count)]
    path = folder / "instruct" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return folder
