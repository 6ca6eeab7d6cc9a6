"""MT-Bench's files, the judge's prompts, and the scores in its words; the tasks on a model are in test_instruct."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from basisadapt import InputError
from basisadapt.tasks.asking import AT_ONCE, ask_all
from basisadapt.tasks.judge import Judge
from basisadapt.tasks.mt_bench import (
    PROMPTS,
    QUESTIONS,
    REFERENCES,
    judged,
    rating,
    read_answers,
    read_bench,
    save_answers,
)
from tests.tasks.files import write_bench


class Says(Judge):
    """Gives the texts of a function of what it is asked."""

    name = "says"

    def __init__(self, say):
        self.say = say

    def ask(self, messages):
        return self.say(messages[-1]["content"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[10]]", 10),
        ("[[7.5]] and more text", 7.5),
        ("[[1]]", 1),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[0.5]]", None),
        ("[[-3]]", None),
        ("[[7/10]]", None),
        ("[[rating]]", None),
        ("[7]", None),
        ("7", None),
        ("[[ 7 ]]", None),
        ("", None),
        ("The first turn [[4]], the second [[9]]", 4),
        ("[[11]], that is [[9]]", None),
        ("[[A]], so [[6]]", 6),
        ("[[[8]]]", 8),
    ],
)
def test_rating(text, value):
    assert rating(text) == value


def test_order_is_fair(tmp_path):
    rows = read_bench(write_bench(tmp_path))
    assert [(q.number, q.category) for q in rows.inputs] == [(81, "writing"), (111, "math"), (82, "writing")]
    assert [q.temperature for q in rows.inputs] == [0.7, 0.0, 0.7]


def test_what_the_judge_is_asked(tmp_path):
    rows = read_bench(write_bench(tmp_path))
    asked = [label.messages(q, (f"{{{q.number}}}", "b")) for q, label in zip(rows.inputs, rows.labels, strict=True)]
    assert asked[0] == (
        [{"role": "system", "content": "single-v1"}, {"role": "user", "content": "Q: Write 81. A: {81}"}],
        [{"role": "system", "content": "single-v1-multi-turn"}, {"role": "user", "content": "Write 81.|{81}|Again.|b"}],
    )
    assert asked[1] == (
        [{"role": "system", "content": "single-math-v1"}, {"role": "user", "content": "Q: Add 111. R: one A: {111}"}],
        [
            {"role": "system", "content": "single-math-v1-multi-turn"},
            {"role": "user", "content": "one|two|Add 111.|{111}|Again.|b"},
        ],
    )


def test_scores_leave_out_what_has_no_rating(tmp_path):
    rows = read_bench(write_bench(tmp_path))
    said = {
        "Q: Write 81.": "[[2]]",
        "Write 81.|": "[[4.5]]",
        "Q: Add": "none",
        "one|two": "[[9]]",
        "Write 82.|": "[[11]]",
    }
    judge = Says(lambda text: next((said[start] for start in said if text.startswith(start)), "Rating: [[3]]"))
    assert judged(rows, [("a", "b")] * 3, judge) == {
        "score": pytest.approx((2 + 4.5 + 9 + 3) / 4),
        "score.turn1": 2.5,
        "score.turn2": 6.75,
        "score.writing": pytest.approx((2 + 4.5 + 3) / 3),
        "score.math": 9,
        "unparsable": 2,
    }
    assert judged(rows, [("a", "b")] * 3, Says(lambda _: "no")) == {"unparsable": 6}


def test_a_judge_that_fails_is_not_asked_on(tmp_path):
    asked = []

    def fail(text):
        asked.append(text)
        raise InputError("the judge has gone home")

    rows = read_bench(write_bench(tmp_path, copies=50))
    with pytest.raises(InputError, match="has gone home"):
        judged(rows, [("a", "b")] * len(rows), Says(fail))
    assert len(asked) <= AT_ONCE


class Hangs(Says):
    """Answers so many at once, and then no more."""

    def __init__(self, answers):
        super().__init__(lambda _: "[[5]]")
        self.left, self.never, self.turn = answers, threading.Event(), threading.Lock()

    def ask(self, messages):
        with self.turn:
            self.left -= 1
        if self.left < 0:
            self.never.wait()
        return super().ask(messages)


def interrupted_after(seconds):
    """A driver's handler, which puts the first Ctrl-C off, and a Ctrl-C to come. Returns what it was told."""
    told = []
    before = signal.signal(signal.SIGINT, lambda *_: told.append("finishing"))
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    return told, before


@pytest.mark.parametrize("answers", [0, 5])
def test_one_ctrl_c_is_enough_where_the_judge_hangs(answers):
    judge = Hangs(answers)
    told, before = interrupted_after(0.2)
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask_all(judge, [[{"content": "?"}]] * 9)
        assert time.monotonic() - began < 30
        assert told == ["finishing"]
        assert signal.getsignal(signal.SIGINT).__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGINT, before)
        judge.never.set()


def test_a_judge_that_answers_is_waited_for_after_ctrl_c():
    def slowly(_):
        time.sleep(0.1)
        return "[[7]]"

    told, before = interrupted_after(0.2)
    try:
        assert ask_all(Says(slowly), [[{"content": "?"}]] * 40) == ["[[7]]"] * 40
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["finishing"]


def test_no_process_waits_for_a_judge_that_hangs():
    program = """if True:
        import signal, time
        from basisadapt.tasks.asking import ask_all
        from basisadapt.tasks.judge import Judge

        class Hangs(Judge):
            def ask(self, messages):
                print("asked", flush=True)
                time.sleep(600)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            ask_all(Hangs(), [[]])
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=60) == ("interrupted\n", None)
        finally:
            process.kill()
    assert process.returncode == 0


def test_answers_are_saved_in_fastchats_format(tmp_path):
    rows = read_bench(write_bench(tmp_path))
    answers = [("eins", "zwei"), ("drei\u2028", "vier"), ("", "sechs\n")]
    path = save_answers(rows, answers, tmp_path / "kept")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["question_id"] for entry in entries] == [81, 82, 111]
    assert entries[1]["choices"] == [{"index": 0, "turns": ["", "sechs\n"]}]
    assert save_answers(rows, answers, tmp_path / "kept") == path
    assert list((tmp_path / "kept").iterdir()) == [path]
    assert read_answers(path, rows) == (rows, answers)
    part = rows.take([1])
    assert read_answers(save_answers(part, answers[1:2], tmp_path), rows) == (part, answers[1:2])
    other = write_bench(tmp_path / "other", first=90)
    with pytest.raises(InputError, match="answers question 81, which MT-Bench does not have"):
        read_answers(path, read_bench(other))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="answers no question of MT-Bench"):
        read_answers(tmp_path / "file", rows)
    with pytest.raises(InputError, match="cannot be saved"):
        save_answers(rows, answers, tmp_path / "file")


def test_equal_answers_may_be_saved_at_once(tmp_path, monkeypatch):
    rows = read_bench(write_bench(tmp_path))
    answers, replace = [("a", "b")] * len(rows), Path.replace

    def meanwhile(half, path):
        monkeypatch.setattr(Path, "replace", replace)
        assert save_answers(rows, answers, tmp_path / "kept") == path
        return replace(half, path)

    monkeypatch.setattr(Path, "replace", meanwhile)
    path = save_answers(rows, answers, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == [path]
    assert read_answers(path, rows) == (rows, answers)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="MT-Bench needs --data-dir"):
        read_bench(None)
    with pytest.raises(InputError, match="cannot be read"):
        read_bench(tmp_path / "nowhere")
    for name in (QUESTIONS, PROMPTS, REFERENCES):
        folder = write_bench(tmp_path / name)
        (folder / "instruct" / name).unlink()
        with pytest.raises(InputError, match=f"has no instruct/{name}"):
            read_bench(folder)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (QUESTIONS, "{", "line 4: not JSON"),
        (QUESTIONS, "[]", "line 4: not an entry of this file"),
        (QUESTIONS, '{"question_id": 1, "category": "math"}', "line 4: 'turns' is missing"),
        (QUESTIONS, '{"question_id": 1, "category": "math", "turns": ["a"]}', "line 4: turns must be two texts"),
        (QUESTIONS, '{"question_id": 1, "category": "math", "turns": ["a", 2]}', "line 4: turns must be two texts"),
        (
            QUESTIONS,
            '{"question_id": "1", "category": "math", "turns": ["a", "b"]}',
            "line 4: question_id must be a whole",
        ),
        (
            QUESTIONS,
            '{"question_id": 1, "category": "maths", "turns": ["a", "b"]}',
            "line 4: unknown category 'maths'; did you mean 'math'?",
        ),
        (QUESTIONS, '{"question_id": 81, "category": "math", "turns": ["a", "b"]}', "has a question twice"),
        (PROMPTS, '{"name": "x", "system_prompt": null, "prompt_template": ""}', "line 5: name, system_prompt"),
        (
            PROMPTS,
            '{"name": "single-v1", "system_prompt": "", "prompt_template": "{answer_a}"}',
            "a template of single-v1 and single-v1-multi-turn cannot be filled: 'answer_a'",
        ),
        (REFERENCES, '{"question_id": 1, "choices": []}', "line 2: not an entry of this file"),
    ],
)
def test_malformed_lines_are_named(tmp_path, name, line, message):
    path = write_bench(tmp_path) / "instruct" / name
    path.write_text(f"\ufeff{path.read_text()}{line}\n")
    with pytest.raises(InputError, match=f"{re.escape(name)}.*{re.escape(message)}"):
        read_bench(tmp_path)


def test_empty_and_broken_files(tmp_path):
    folder = write_bench(tmp_path) / "instruct"
    (folder / QUESTIONS).write_text("\n")
    with pytest.raises(InputError, match="has no questions"):
        read_bench(tmp_path)
    (folder / QUESTIONS).write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="cannot be read"):
        read_bench(tmp_path)
    write_bench(tmp_path)
    (folder / REFERENCES).write_text("")
    with pytest.raises(InputError, match=f"{REFERENCES} has no answers to question 111"):
        read_bench(tmp_path)
    (folder / PROMPTS).write_text("")
    with pytest.raises(InputError, match="has no prompt 'single-v1'"):
        read_bench(tmp_path)


def test_the_published_files(data_dir):
    rows = read_bench(data_dir)
    assert len(rows) == 80
    assert len({question.category for question in rows.inputs[:8]}) == 8
    texts = []
    judge = Says(lambda text: texts.append(text) or "[[6]]")
    metrics = judged(rows, [(f"<first {q.number}>", f"<second {q.number}>") for q in rows.inputs], judge)
    assert metrics["score"] == 6
    assert metrics["unparsable"] == 0
    assert sum(name.startswith("score.") for name in metrics) == 10
    assert len(texts) == 160
    assert sum("Reference" in text for text in texts) == 60
    for question in rows.inputs:
        (alone, both) = sorted(
            (text for text in texts if f"<first {question.number}>" in text), key=lambda t: "<sec" in t
        )
        assert f"<second {question.number}>" in both
        assert all(turn in both for turn in question.turns)
        assert question.turns[1] not in alone
