"""Alpaca and MT-Bench on a tiny language model, with an endpoint that says numbers."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from basisadapt import InputError, backbones
from basisadapt.mt_bench import main
from basisadapt.study.__main__ import main as study
from basisadapt.tasks import find, hub
from basisadapt.tasks.completion import generate, pad_left
from basisadapt.tasks.instruct import converse
from basisadapt.tasks.mt_bench import read_answers, read_bench
from basisadapt.tasks.settings import DataSettings
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig
from tests.tasks.endpoint import says
from tests.tasks.files import write_alpaca, write_bench


@pytest.fixture
def data(tmp_path):
    """Alpaca and MT-Bench."""
    return write_alpaca(write_bench(tmp_path / "data"))


@pytest.fixture
def judged_by(monkeypatch, tmp_path, endpoint):
    """An endpoint that is set as the judge, and gives every answer a 6."""
    endpoint.replies = [says("Rating: [[6]]")]
    values = {"URL": endpoint.url, "MODEL": "tester", "KEY": "sk-secret", "DIR": str(tmp_path / "kept")}
    for name, value in values.items():
        monkeypatch.setenv(f"BASISADAPT_JUDGE_{name}", value)
    return endpoint


@pytest.fixture
def config(language_model):
    def make(task, **values):
        train = {"max_steps": 2, "batch_size": 4, "train_rows": 16, **values.pop("train", {})}
        plain = {"task": task, "backbone": str(language_model), "method": "lora", "train": train}
        return RunConfig.from_mapping({**plain, "data": {"max_new_tokens": 12}, "adapter": {"r": 2}, **values})

    return make


# --- Alpaca ---


def test_one_row_in_twenty_is_held_out_by_its_content(tmp_path):
    data = find("instruct/alpaca", DataSettings()).load(write_alpaca(tmp_path, 400))
    assert len(data.train) + len(data.eval) == 400
    assert 10 <= len(data.eval) <= 32
    held_out = set(data.eval.labels)
    again = find("instruct/alpaca", DataSettings()).load(
        write_alpaca(write_alpaca(tmp_path, 300), 200, "alpaca_b.json")
    )
    assert len(again.train) + len(again.eval) == 300, "what is twice counts once"
    assert set(again.eval.labels) == {label for label in held_out if int(label[6:-1]) < 300}
    assert set(again.eval.labels).isdisjoint(again.train.labels)
    with_input = [question.prompt for question in data.train.inputs if "### Input:" in question.prompt]
    assert 150 < len(with_input) < 250
    assert all(prompt.endswith("\n\n### Response:\n") for prompt in with_input)


def test_files_that_will_not_do(tmp_path):
    task = find("instruct/alpaca", DataSettings())
    with pytest.raises(InputError, match=r"has no instruct/alpaca\*.json"):
        task.check(tmp_path)
    with pytest.raises(InputError, match="3 rows are too few"):
        task.load(write_alpaca(tmp_path, 3))
    path = tmp_path / "instruct" / "alpaca_data.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]))
    with pytest.raises(InputError, match=r"alpaca_data.json', row 2 needs a text called 'output'"):
        task.load(tmp_path)


def test_without_a_folder_the_hub_is_asked(monkeypatch, tmp_path):
    task = find("instruct/alpaca", DataSettings())
    task.check(None)
    here = task.load(write_alpaca(tmp_path))
    rows = json.loads((tmp_path / "instruct" / "alpaca_data.json").read_text())
    columns = {name: [row[name] for row in rows] for name in ("instruction", "input", "output")}
    monkeypatch.setattr(hub, "ask_hub", lambda source, *_: {"tatsu-lab/alpaca": {"train": columns}}[source])
    assert task.load(None) == here

    def fail(source, *_):
        raise InputError(f"hub data set {source!r} could not be loaded: no network")

    monkeypatch.setattr(hub, "ask_hub", fail)
    with pytest.raises(InputError, match=r"task instruct/alpaca needs --data-dir or the hub: .* no network"):
        task.load(None)


def test_a_run_on_alpaca(config, tmp_path):
    chosen = config("instruct/alpaca")
    result = run(chosen, data_dir=write_alpaca(tmp_path))
    assert result.headline == "token_accuracy"
    assert 0 <= result.metrics["token_accuracy"] <= 1
    # Rows weigh alike in eval_loss, tokens in perplexity; these responses are nearly of one length.
    assert math.log(result.metrics["perplexity"]) == pytest.approx(result.metrics["eval_loss"], rel=0.02)
    assert -1 < result.metrics["generalisation_gap"] < 1


def test_scores_count_response_tokens(language_model, tmp_path):
    task = find("instruct/alpaca", DataSettings())
    rows = task.load(write_alpaca(tmp_path)).train.head(5)
    model, processor = backbones.load(backbones.find(str(language_model)), "completion", 1)
    batch = task.collator(processor)(task.examples(rows, processor, None, training=False))
    loss, scores = task.score(model.eval(), batch)
    right = tokens = total = 0
    for question, response in zip(rows.inputs, rows.labels, strict=True):
        prompt = processor(question.prompt)["input_ids"]
        ids = torch.tensor([*prompt, *processor(response)["input_ids"], processor.eos_token_id])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        right += int((logits.argmax(-1) == ids[len(prompt) :]).sum())
        tokens += len(ids) - len(prompt)
        total += torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="sum").item()
    measured = task.measure(scores.numpy(), rows, processor)
    assert measured == pytest.approx(
        {"token_accuracy": right / tokens, "perplexity": math.exp(total / tokens)}, rel=1e-4
    )
    assert loss.item() > 0


# --- MT-Bench ---


def test_no_judge_is_asked_about_a_run_that_its_last_update_broke(config, data, judged_by):
    """The answers have no loss to tell it by; training rows have."""
    result = run(config("instruct/mt_bench", train={"lr": 1e30}), data_dir=data)
    assert result.status == "diverged"
    assert "score" not in result.metrics
    assert judged_by.requests == []


def test_a_run_is_judged_and_recorded(config, data, judged_by, tmp_path):
    chosen = config("instruct/mt_bench")
    plan(chosen, data)
    assert not (tmp_path / "kept").exists(), "planning leaves nothing behind"
    result = run(chosen, data_dir=data)
    assert (result.status, result.headline) == ("finished", "score")
    scores = {name: value for name, value in result.metrics.items() if name.startswith(("score", "unpars"))}
    assert scores == {
        **dict.fromkeys(["score", "score.turn1", "score.turn2", "score.writing", "score.math"], 6),
        "unparsable": 0,
    }
    assert {"eval_loss", "generalisation_gap"}.isdisjoint(result.metrics)
    assert result.environment["judge"] == "tester"
    _, answers = read_answers(tmp_path / "kept" / result.environment["answers"].rpartition("/")[2], read_bench(data))
    asked = [body["messages"][-1]["content"] for _, _, body in judged_by.requests]
    assert len(asked) == 6
    assert all(f"A: {first}" in "".join(asked) and f"|{second}" in "".join(asked) for first, second in answers)
    # Equal seeds give equal answers, whose judgements are recorded; another seed, others.
    assert run(chosen, data_dir=data).environment["answers"] == result.environment["answers"]
    assert len(judged_by.requests) == 6
    other = run(config("instruct/mt_bench", seed=7), data_dir=data)
    assert other.environment["answers"] != result.environment["answers"]


def test_evaluating_on_the_way_changes_no_training(config, data, judged_by):
    phi = {"method": "phi", "adapter": {"r": 2, "dropout": 0.1}}
    alone = run(config("instruct/mt_bench", **phi), data_dir=data)
    often = run(config("instruct/mt_bench", train={"eval_steps": 1}, **phi), data_dir=data)
    assert often.metrics["train_loss"] == alone.metrics["train_loss"]
    assert [value for _, value in often.curves["eval_score"]] == [6, 6]


def test_a_judge_that_fails_loses_no_answer(config, data, judged_by, capsys):
    judged_by.replies = [says("[[4]]"), (401, "who are you?")]
    with pytest.raises(InputError, match=r"judge 'tester' refuses: HTTP 401 .*; the answers are kept: ") as raised:
        run(config("instruct/mt_bench"), data_dir=data)
    (saved,) = re.findall(r"python -m basisadapt.mt_bench (\S+) --data-dir", str(raised.value))
    before = len(judged_by.requests)
    judged_by.replies = [says("[[8]]")]
    assert main([saved, "--data-dir", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "3 questions, judged by tester" in printed
    assert re.search(rf"score +{(4 + 5 * 8) / 6:.4g}\n", printed), "the first judgement was kept"
    assert len(judged_by.requests) - before == 5


def test_a_study_is_refused_without_a_judge(data, language_model, tmp_path, monkeypatch, capsys):
    for name in ("URL", "MODEL", "DIR"):
        monkeypatch.delenv(f"BASISADAPT_JUDGE_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    asked = ["ablate_basis", "--set", "task=instruct/mt_bench", "--set", f"backbone={language_model}"]
    assert study([*asked, "--data-dir", str(data)]) == 2
    assert "MT-Bench needs a judge: set BASISADAPT_JUDGE_URL" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.db"))


STUDY = """
title: Judged
question: Who answers best?
base: {task: instruct/mt_bench, method: lora, adapter: {r: 2}, data: {max_new_tokens: 4}}
beside: [{label: LoRA, set: {train.max_steps: 1}}]
seeds: [1]
"""


def test_a_study_goes_on_when_its_judge_is_back(data, language_model, judged_by, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged.yaml").write_text(STUDY)
    command = ["judged.yaml", "--data-dir", str(data), "--set", f"backbone={language_model}"]
    judged_by.replies = [says("[[4]]"), says("[[4]]"), (403, "no credit")]
    assert study(command) == 1
    assert "no credit" in capsys.readouterr().out
    judged_by.requests.clear()
    judged_by.replies = [says("[[4]]"), says("none"), says("[[10]]")]
    assert study([*command, "--output", "page"]) == 0
    # Two 4s are recorded; four judgements are asked for, one of which names no rating.
    assert re.search(rf"LoRA +{(4 + 4 + 4 + 10 + 10) / 5:.4f} ", capsys.readouterr().out)
    assert len(judged_by.requests) == 4
    assert "<dt>judge</dt><dd>tester</dd>" in (tmp_path / "page" / "report.html").read_text()


def test_training_rows_do_not_stand_in_for_questions(config, data, judged_by):
    with pytest.raises(InputError, match=r"validation evaluates .* which task 'instruct/mt_bench' cannot"):
        plan(config("instruct/mt_bench", train={"validation": 0.2}), data)


def test_the_command_refuses_bad_input(data, judged_by, tmp_path, capsys):
    for arguments, message in {
        (str(tmp_path / "none"), str(data)): "none cannot be read",
        (str(data), str(tmp_path)): "has no instruct/mt_bench_question.jsonl",
    }.items():
        assert main([arguments[0], "--data-dir", arguments[1]]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert judged_by.requests == []


def test_conversations_longer_than_the_backbone_reads_are_refused(config, data, judged_by):
    with pytest.raises(InputError, match=r"max_new_tokens 1000 is too long: .* but the backbone reads at most 2048"):
        run(config("instruct/mt_bench", data={"max_new_tokens": 1000}), data_dir=data)


@pytest.fixture
def asked(language_model, data):
    """A model, its tokenizer, the task, and a batch of questions."""
    task = find("instruct/mt_bench", DataSettings(max_new_tokens=8))
    rows = read_bench(data)
    model, processor = backbones.load(backbones.find(str(language_model)), "completion", 1)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30  # random weights hardly prefer a token
    model.generation_config.update(temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=2.0)
    torch.manual_seed(3)
    return model.eval(), processor, task, task.examples(rows, processor, None, training=False)


def test_the_second_turn_sees_the_first_answer(asked):
    model, processor, task, examples = asked
    math_alone = [examples[1]]
    answers = converse(model, task.collator(processor)(math_alone), 8)
    assert answers.shape == (1, 2, 8)
    first = [token for token in answers[0, 0].tolist() if token > 1]
    whole = [
        *examples[1]["input_ids"],
        *first,
        processor.eos_token_id,
        *processor("\n\n### Instruction:\nAgain.\n\n### Response:\n")["input_ids"],
    ]
    assert answers[0, 1].tolist() == generate(model, pad_left([whole], 0), 8)[0].tolist()
    # In a batch of questions of other lengths and temperatures a greedy answer stays what it is.
    assert converse(model, task.collator(processor)(examples), 8)[1].tolist() == answers[0].tolist()


def test_answers_are_drawn_at_the_questions_temperature(asked):
    model, processor, _, examples = asked
    prompt = pad_left([examples[0]["input_ids"][-8:]] * 3000, processor.pad_token_id)
    logits = model(**{name: ids[:1] for name, ids in prompt.items()}).logits[0, -1]
    for temperature in (0.7, 2.0):
        drawn = generate(model, prompt, 1, torch.full((3000,), temperature)).flatten()
        expected = (logits / temperature).softmax(-1)
        found = torch.bincount(drawn, minlength=len(expected)) / 3000
        assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / 3000)
        assert found.count_nonzero() > 20, "nothing but the temperature narrows the choice"
    mixed = generate(model, prompt, 1, torch.tensor([0.0, 2.0, 0.7] * 1000)).flatten()
    assert set(mixed[::3].tolist()) == {int(logits.argmax())}


def test_asking_uses_up_no_random_number(asked):
    model, processor, task, examples = asked
    batch = task.collator(processor)(examples)
    state = torch.get_rng_state()
    first = converse(model, batch, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(converse(model, batch, 8), first)


def test_answers_end_where_the_model_ends_them(asked):
    """A first answer that ends at once, and padding after it, are no part of the second turn."""
    model, processor, task, examples = asked
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        hidden = model.model(torch.tensor([examples[1]["input_ids"]])).last_hidden_state[0, -1]
        head[processor.eos_token_id] += 100 * hidden / hidden.norm()
    answers = converse(model, task.collator(processor)([examples[1]]), 8)
    assert answers[0, 0].tolist() == [processor.eos_token_id, *[processor.pad_token_id] * 7]
    whole = pad_left([[*examples[1]["input_ids"], *examples[1]["second"]]], processor.pad_token_id)
    assert answers[0, 1].tolist() == generate(model, whole, 8)[0].tolist()


def test_alpaca_and_mt_bench_as_published(data_dir, language_model, judged_by):
    data = find("instruct/mt_bench", DataSettings()).load(data_dir)
    assert len(data.eval) == 80
    rows = find("instruct/alpaca", DataSettings()).load(data_dir)
    assert len(rows.train) == len(data.train)
    assert 0.03 < len(rows.eval) / (len(rows.eval) + len(rows.train)) < 0.07
