"""Strings whose answers follow from a rule: what is trained on, what is held out, and what is measured of either."""

from __future__ import annotations

import math

import numpy as np
import pytest

from basisadapt import InputError
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.tasks import TASKS, DataSettings
from basisadapt.tasks.facts import PhoneBook
from basisadapt.tasks.rules import RuleTask
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig
from tests.tasks.test_facts import bert as bert
from tests.tasks.test_facts import config

RULES = sorted(name for name in TASKS if issubclass(TASKS[name], RuleTask))
SYMBOLS = 11


def made(name, facts=30, **settings):
    return TASKS[name](DataSettings(facts=facts, symbols=SYMBOLS, **settings))


def pairs(task, rows):
    """Keys and their answers, as tuples, without the answers that a language model reads behind a key."""
    answers = [label if isinstance(label, list) else [label] for label in rows.labels]
    return [(tuple(key[: task.read[0]]), tuple(answer)) for key, answer in zip(rows.inputs, answers, strict=True)]


def test_every_rule_is_asked_of_an_encoder_and_of_a_language_model():
    kinds = {name.rpartition("/")[0] for name in RULES}
    assert kinds == {"modular/add", "modular/multiply", "modular/random", "cipher"}
    assert {f"{kind}/{form}" for kind in kinds for form in ("states", "text")} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_what_is_asked_is_half_trained_and_half_new(name):
    task = made(name)
    data, again, other = (task.of_seed(seed) for seed in (3, 3, 4))
    assert (data.train, data.eval) == (again.train, again.eval)
    assert data.train.inputs != other.train.inputs
    assert (len(data.train), len(data.eval)) == (30, 60)
    assert data.eval.head(30) == data.train
    keys, answers = zip(*pairs(task, data.eval), strict=True)
    assert len(set(keys)) == 60, "nothing is drawn twice"
    words = {word for key in keys for word in key}
    assert len({word % 5000 for word in words}) == len(words) == SYMBOLS, "different words in every vocabulary"
    assert {one for answer in answers for one in answer} == set(range(SYMBOLS))
    assert task.num_labels == SYMBOLS
    if isinstance(task, PhoneBook):
        assert [key[task.read[0] :] for key in data.eval.inputs] == data.eval.labels
        assert {len(label) for label in data.eval.labels} == {task.read[1]} == {len(task.unknown)}


def test_a_pair_and_its_mirror_are_one_string():
    """Else most sums that are held out would be known from their mirrors, by someone who cannot add."""
    task = made("modular/add/states", facts=66)
    keys = [key for key, _ in pairs(task, task.of_seed(1).eval)]
    assert len(keys) == len({frozenset(key) for key in keys}) == SYMBOLS * (SYMBOLS + 1) / 2


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("modular/add/states", lambda a, b: (a + b) % SYMBOLS),
        ("modular/multiply/states", lambda a, b: a * b % SYMBOLS),
    ],
)
def test_modular_arithmetic(name, rule):
    """Of every pair once."""
    task = made(name)
    strings = task.strings(np.arange(task.count))
    assert {tuple(pair) for pair in strings.tolist()} == {(a, b) for b in range(SYMBOLS) for a in range(b + 1)}
    classes = task.rule(strings, np.random.default_rng(0))
    assert classes[:, 0].tolist() == [rule(a, b) for a, b in strings.tolist()]


def test_a_word_stands_for_one_number():
    """That of a + a tells which, and so all other sums."""
    task = made("modular/add/states", facts=66)
    sums = pairs(task, task.of_seed(2).eval)
    half = (SYMBOLS + 1) // 2
    number = {a: half * total % SYMBOLS for (a, b), (total,) in sums if a == b}
    assert len(set(number.values())) == SYMBOLS
    assert all((number[a] + number[b]) % SYMBOLS == total for (a, b), (total,) in sums)


def test_a_letter_is_encrypted_alike_everywhere():
    """One permutation, another one for every seed."""
    whole, first = made("cipher/text"), made("cipher/states")
    codes = []
    for seed in (1, 2):
        seen = pairs(whole, whole.of_seed(seed).eval)
        code = {word: one for key, answer in seen for word, one in zip(key, answer, strict=True)}
        assert all(tuple(code[word] for word in key) == answer for key, answer in seen)
        assert sorted(code.values()) == list(range(SYMBOLS))
        assert pairs(first, first.of_seed(seed).eval) == [(key, answer[:1]) for key, answer in seen]
        codes.append([code[word] for word in sorted(code)])
    assert codes[0] != codes[1]


def test_nothing_follows_in_the_control():
    """Among all pairs of a large alphabet, one in 97 classes agrees with a sum."""
    task = TASKS["modular/random/states"](DataSettings(symbols=97))
    strings = task.strings(np.arange(task.count))
    drawn, other = (task.rule(strings, np.random.default_rng(seed))[:, 0] for seed in (0, 1))
    for rule in (other, strings.sum(axis=1) % 97, strings.prod(axis=1) % 97):
        assert np.mean(drawn == rule) == pytest.approx(1 / 97, abs=4 * math.sqrt(1 / 97 / task.count))


@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("name", ["modular/add/states", "cipher/text"])
def test_what_is_stored_and_what_is_derived(name, probes, monkeypatch):
    """Bits and recall of the strings that are trained on, n (log2 p - H); the share of right answers to the others."""
    monkeypatch.setattr("basisadapt.tasks.facts._texts", lambda part, setting, count: ["a text"] * count)
    task = made(name, probes=probes)
    rows = task.of_seed(5).eval
    right = np.eye(SYMBOLS)[np.array([answer for _, answer in pairs(task, rows.head(60))])]
    noise = np.random.default_rng(0).normal(size=right[:30].shape)
    known = np.concatenate([noise, 100 * right[30:]])
    known[40:45, 0] = 0  # whose likeliest class is the first one
    p = np.exp(noise) / np.exp(noise).sum(axis=-1, keepdims=True)
    expected = np.sum(np.log2(SYMBOLS) + np.log2((p * right[:30]).sum(axis=-1)))
    logits = known if task.read[1] > 1 else known[:, 0]
    if probes:
        of_texts = np.random.default_rng(1).normal(size=(probes, *logits.shape[1:]))
        logits = np.repeat(np.concatenate([logits, of_texts])[:, None], 2, axis=1)
    found = task.measure(logits, rows, None)
    wrong = np.sum(right[40:45, 0].argmax(axis=-1) != 0)
    assert wrong > 0
    assert found["bits"] == pytest.approx(expected)
    assert found["recall"] == np.mean((noise.argmax(axis=-1) == right[:30].argmax(axis=-1)).all(axis=-1))
    assert found["held_out"] == pytest.approx(1 - wrong / (30 * task.read[1]))
    assert found.get("forgotten", 0) == pytest.approx(0, abs=1e-9)


def test_nothing_is_held_out_where_all_strings_are_trained_on():
    task = made("modular/add/states", facts=66)
    data = task.of_seed(1)
    assert len(data.train) == len(data.eval) == 66
    assert "held_out" not in task.measure(np.zeros((66, SYMBOLS)), data.eval, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"facts": 67, "symbols": 11}, r"data.facts must be at most 66, the strings that there are of 11 symbols"),
        ({"symbols": 1}, "data.symbols must be at least 2 and at most 1,000, got 1"),
        ({"symbols": 1001}, "data.symbols must be at least 2 and at most 1,000, got 1001"),
        ({"probes": 10**6}, "data.probes must be at most"),
    ],
)
def test_what_has_no_meaning_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        plan(RunConfig.from_mapping({"task": "modular/add/states", "data": data}), dry=True)


def test_rows_that_cannot_be_drawn_are_never_fewer():
    with pytest.raises(InputError, match=r"data\.facts must be at most 66"):
        made("modular/add/states", facts=67).of_seed(1)


def test_a_cipher_is_derived_and_random_classes_are_not(bert):
    """Of strings that were never trained on; the model has random weights."""

    def known(task, facts):
        values = config(bert, task=task, facts=facts, lr=0.1, max_steps=60, max_grad_norm=10).to_mapping()
        return run(RunConfig.from_mapping({**values, "data": {"facts": facts, "symbols": 9}}))

    cipher, control = known("cipher/states", 60), known("modular/random/states", 30)
    assert (cipher.data["train_rows"], cipher.data["eval_rows"]) == (60, 120)
    assert (control.data["train_rows"], control.data["eval_rows"]) == (30, 45)
    assert cipher.metrics["held_out"] > 3 / 9
    assert control.metrics["held_out"] < 3 / 9
    assert control.metrics["recall"] > 3 / 9, "which is stored nonetheless"


def test_the_study_has_a_control_beside_every_rule():
    """The same strings, settings and rates; only whether the answers follow from anything differs."""
    spec = read_spec("rules")
    for preset, form in (("quick", "states"), ("gpu", "states"), ("llm", "text")):
        found = {}
        for row in resolve(spec, preset=preset).rows:
            values = row.cells[0].config.to_mapping()
            found.setdefault(values.pop("task"), []).append(values)
        control = found.pop(f"modular/random/{form}")
        assert len(control) == 5 * (2 if preset == "quick" else 3)
        assert found
        assert all(rows == control for rows in found.values())
