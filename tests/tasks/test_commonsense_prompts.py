"""The commonsense suite: the published rule for answers, prompts, rows of the hub and the real files."""

from __future__ import annotations

import collections
import json

import pytest

from basisadapt import InputError
from basisadapt.tasks import DataSettings, commonsense, find, hub
from basisadapt.tasks import commonsense_prompts as prompts
from basisadapt.tasks.choice import extract
from basisadapt.tasks.commonsense import SOURCES
from basisadapt.tasks.hub import ask_hub
from tests.tasks.commonsense_rows import (
    ANSWERS,
    ENDINGS,
    FILLINGS,
    SOLUTIONS,
    TRUE_FALSE,
    WRITTEN,
)


@pytest.fixture(autouse=True)
def _fresh_hub():
    ask_hub.cache_clear()
    yield
    ask_hub.cache_clear()


# --- the published rule for answers ---

FIVE = ("answer1", "answer2", "answer3", "answer4", "answer5")


@pytest.mark.parametrize(
    ("text", "names", "answer"),
    [
        ("the correct answer is answer3", FIVE, "answer3"),
        ("answer2, or answer1", FIVE, "answer2"),
        ("I cannot say.", FIVE, None),
        ("", FIVE, None),
        ("the correct answer is ANSWER3", FIVE, None),
        ("Answer1", FIVE, None),
        ("Answer1 answer4", FIVE, "answer4"),
        ("answer 3", FIVE, None),
        ("answer3answer1", FIVE, "answer3"),
        ("answer10 it is", FIVE, "answer1"),
        ("answer6", FIVE, None),
        ("answer5, of four", FIVE, "answer5"),
        ("  \n the correct answer is answer1\n\n### Instruction:\nanswer2", FIVE, "answer1"),
        ("solution1 true option2 ending3", FIVE, None),
        ("the correct answer is solution2", ("solution1", "solution2"), "solution2"),
        ("that is untrue, false", ("true", "false"), "true"),
        ("True", ("true", "false"), None),
        ("answer format: true/false\n### Response:\nfalse", ("true", "false"), "false"),
        ("answer1 ### Response: answer2 ### Response: answer3", FIVE, "answer2"),
        ("answer1 ### Response: none ### Response: answer3", FIVE, None),
        ("answer1 ### response: answer2", FIVE, "answer1"),
    ],
)
def test_extraction(text, names, answer):
    assert extract(text, names) == answer


# --- prompts ---


@pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.names[0])
def test_instructions_are_read_and_written(layout):
    instruction, question, options = WRITTEN[layout]
    assert layout.parse(instruction) == (question, options)
    assert layout.render(question, options) == instruction
    asked = layout.question(instruction, "group")
    names = layout.names[: len(options)] if options else ("true", "false")
    assert [option.name for option in asked.options] == list(names)
    assert [option.response for option in asked.options] == [f"the correct answer is {name}" for name in names]
    assert f"\n{instruction}\n" in asked.prompt


@pytest.mark.parametrize(
    ("layout", "plain", "options", "per_character"),
    [
        (TRUE_FALSE, "Question: is ice cold?\nAnswer:", [("", " yes"), ("", " no")], False),
        (SOLUTIONS, "Question: cool a drink\nAnswer:", [("", " add ice "), ("", " add fire")], True),
        (ANSWERS, "Question: What is cold?\nAnswer:", [("", " ice"), ("", " fire"), ("", " Answer2: ")], True),
        (
            ENDINGS,
            "Skating: She falls. She",
            [("", " gets up."), ("", " melts."), ("", " , a cat, sings."), ("", " ")],
            True,
        ),
        (FILLINGS, "Ice cools tea, as", [(" ice", " is cold."), (" tea", " is cold.")], False),
    ],
    ids=lambda value: value.names[0] if isinstance(value, prompts.Layout) else "",
)
def test_plain_questions(layout, plain, options, per_character):
    asked = layout.question(WRITTEN[layout][0], "group")
    assert asked.plain == plain
    assert [(option.lead, option.text) for option in asked.options] == options
    assert asked.per_character is per_character


def test_a_sentence_that_begins_with_its_blank():
    asked = FILLINGS.question(FILLINGS.render("_ is cold.", ("Ice", "Tea")), "winogrande")
    assert (asked.plain, asked.options[0].lead, asked.options[0].text) == ("", "Ice", " is cold.")
    with pytest.raises(InputError, match="no blank"):
        FILLINGS.question(FILLINGS.render("It is cold.", ("Ice", "Tea")), "winogrande")


@pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.names[0])
@pytest.mark.parametrize(
    "spoil", [str.lower, lambda text: text[:-1], lambda text: text.replace("\n\n", "\n"), lambda _: ""]
)
def test_other_instructions_are_refused(layout, spoil):
    with pytest.raises(InputError, match="not one of the published form"):
        layout.parse(spoil(WRITTEN[layout][0]))


def cold(asked, labels, answer):
    """A row of ARC or OpenBookQA. asked: the column of the question."""
    choices = {"text": ["ice", "fire", "Answer2: "], "label": list(labels)}
    return {asked: "What is cold?", "choices": choices, "answerKey": answer}


@pytest.mark.parametrize(
    ("source", "row", "instruction", "right"),
    [
        ("boolq", {"question": "is ice cold", "answer": True, "passage": "Ice."}, WRITTEN[TRUE_FALSE][0], 0),
        ("boolq", {"question": "is ice cold", "answer": False, "passage": "Ice."}, WRITTEN[TRUE_FALSE][0], 1),
        (
            "piqa",
            {"goal": "cool a drink", "sol1": "add ice ", "sol2": "add fire", "label": 1},
            WRITTEN[SOLUTIONS][0],
            1,
        ),
        (
            "social_i_qa",
            {
                "context": "Ann froze.",
                "question": "What now?",
                "answerA": "rest",
                "answerB": "run",
                "answerC": "sing",
                "label": "3",
            },
            "Please choose the correct answer to the question: Ann froze. What now?\n\nAnswer1: rest Answer2: run "
            "Answer3: sing\n\nAnswer format: answer1/answer2/answer3",
            2,
        ),
        (
            "hellaswag",
            {
                "activity_label": "Skating",
                "ctx": "She falls. She",
                "endings": ["gets up.", "melts.", ", a cat, sings.", ""],
                "label": "0",
            },
            WRITTEN[ENDINGS][0],
            0,
        ),
        (
            "winogrande",
            {"sentence": "Ice cools tea, as _ is cold.", "option1": "ice", "option2": "tea", "answer": "1"},
            WRITTEN[FILLINGS][0],
            0,
        ),
        ("arc_easy", cold("question", "ABC", "B"), WRITTEN[ANSWERS][0], 1),
        ("arc_challenge", cold("question", "123", "1"), WRITTEN[ANSWERS][0], 0),
        ("openbookqa", cold("question_stem", "ABC", "C"), WRITTEN[ANSWERS][0], 2),
    ],
)
def test_rows_of_the_hub_become_published_prompts(monkeypatch, source, row, instruction, right):
    import datasets

    asked = []
    tested = "test" if source in ("arc_easy", "arc_challenge", "openbookqa") else "validation"
    splits = {"train": [row, row], tested: [row]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or splits)
    data = find(f"commonsense/{source}", DataSettings()).load(None)
    layout, place = SOURCES[source].layout, SOURCES[source]
    assert data.eval.inputs[0] == layout.question(instruction, source)
    assert set(data.eval.labels) == {f"the correct answer is {layout.names[right]}"}
    assert asked == [((place.hub, place.subset), {"revision": place.revision})], "once for both splits"
    assert data.about == {"split": f"trained on {source} (2); tested on {source} (1)"}


def test_a_regime_is_rebuilt_from_the_hub_without_a_folder(monkeypatch):
    """As from the training files of one, and said so; a mixture of one's own has to lie somewhere."""
    rows = {
        "google/boolq": {"question": "is it cold", "answer": True},
        "allenai/openbookqa": {
            "question_stem": "What is cold?",
            "choices": {"text": ["ice", "fire", "air", "sun"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
    }
    few = {name: place for name, place in SOURCES.items() if place.hub in rows}
    monkeypatch.setattr(commonsense, "SOURCES", few)
    splits = ("train", "validation", "test")
    monkeypatch.setattr(hub, "ask_hub", lambda source, *_: dict.fromkeys(splits, [rows[source]] * 9))
    data = find("commonsense/170k", DataSettings()).load(None)
    assert len(data.train) == 18
    assert data.about["split"].startswith("rebuilt without commonsense_170k.json, from all rows of the training files")
    with pytest.raises(InputError, match=r"mine\.json needs --data-dir"):
        find("commonsense/mine", DataSettings()).check(None)


def test_a_hub_that_fails_or_changed(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"boolq needs --data-dir or the hub: .*'google/boolq' .*: no route"):
        find("commonsense/boolq", DataSettings()).load(None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": [{"goal": "a"}]})
    with pytest.raises(InputError, match="ybisk/piqa, train, row 1 is not laid out as expected: KeyError"):
        find("commonsense/piqa", DataSettings()).load(None)
    ask_hub.cache_clear()
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": [row]})
    with pytest.raises(InputError, match="row 1: there is no option 0"):
        find("commonsense/piqa", DataSettings()).load(None)


def test_published_files_are_read_and_written_byte_by_byte(data_dir):
    files = 0
    for source in SOURCES.values():
        for path in sorted((data_dir / "commonsense" / source.folder).glob("t*.json")):
            files += 1
            for row in json.loads(path.read_text(encoding="utf-8")):
                question, options = source.layout.parse(row["instruction"])
                assert source.layout.render(question, options) == row["instruction"]
    assert files >= 11


def test_the_real_suite(data_dir):
    data = find("commonsense/all", DataSettings()).load(data_dir)
    counts = collections.Counter(question.group for question in data.eval.inputs)
    assert counts["boolq"] == 3270
    assert counts["arc_easy"] == 2376
    assert counts["hellaswag"] == 1000
    first = collections.Counter(question.group for question in data.eval.head(10 * len(counts)).inputs)
    assert set(first.values()) == {10}
    there = {
        name for name, source in SOURCES.items() if (data_dir / "commonsense" / source.folder / "train.json").is_file()
    }
    assert {question.group for question in data.train.inputs} == there > {"boolq", "arc_easy"}
    assert collections.Counter(data.train.labels)["the correct answer is true"] == 5874
