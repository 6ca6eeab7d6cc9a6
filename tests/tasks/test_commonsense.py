"""The commonsense suite: files, mixtures and what is refused of them."""

from __future__ import annotations

import collections
import json
import re

import pytest

from basisadapt import InputError
from basisadapt.tasks import DataSettings, find
from basisadapt.tasks import commonsense_prompts as prompts
from basisadapt.tasks.commonsense import SOURCES, Commonsense15k
from basisadapt.training import run
from basisadapt.training.config import RunConfig
from tests.tasks.commonsense_rows import (
    TRUE_FALSE,
    WRITTEN,
    write,
    written_row,
)


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
