"""Language models: what is trained on, what is looked at, what is written; and the files that rows come from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from basisadapt import InputError
from basisadapt.methods import METHODS
from basisadapt.tasks import DataSettings, Rows
from basisadapt.tasks import completion as module
from basisadapt.tasks.completion import (
    IGNORED,
    CompletionTask,
    Continuation,
    Probe,
    Question,
    batch_loss,
    generate,
    packed,
    padded,
    reads_rows_apart,
    response_loss,
    teacher_forced,
)
from basisadapt.tasks.instructions import Instruction, alpaca_prompt, read_instructions
from basisadapt.training.cost import Cost

ROWS = Rows(
    [Question(alpaca_prompt("Name a colour.")), Question("Hi"), Question(alpaca_prompt("Which?", "red or blue"))],
    ["Green, of course.", "Hello", "red"],
)


class Free(CompletionTask):
    """Looks at the response and at a text with a lead."""

    headline = "loss"

    def check(self, data_dir):
        """Nothing to check."""

    def load(self, data_dir):
        raise NotImplementedError

    def probe(self, question, response):
        own = Continuation(response, ends=True)
        return Probe(question.prompt, (own, Continuation(" is it", lead="What colour")))

    def score(self, model, batch):
        raise NotImplementedError

    def measure(self, scores, rows, processor):
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer(language_model):
    return AutoTokenizer.from_pretrained(language_model)


@pytest.fixture
def model(language_model):
    return AutoModelForCausalLM.from_pretrained(language_model).eval()


@pytest.fixture
def task():
    return Free()


def probes(task, tokenizer, rows=ROWS):
    examples = task.examples(rows, tokenizer, None, training=False)
    return examples, task.collator(tokenizer)(examples)


def test_alpacas_template():
    assert alpaca_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert alpaca_prompt("Add.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )


@pytest.mark.parametrize("on_inputs", [False, True])
def test_the_loss_covers_the_response_and_its_end(tokenizer, on_inputs):
    task = Free(DataSettings(train_on_inputs=on_inputs))
    for example, question, response in zip(
        task.examples(ROWS, tokenizer, None, training=True), ROWS.inputs, ROWS.labels, strict=True
    ):
        assert tokenizer.decode(example["input_ids"]) == question.prompt + response + "<eos>"
        counted = [label for label in example["labels"] if label != IGNORED]
        assert tokenizer.decode(counted) == (question.prompt if on_inputs else "") + response + "<eos>"
        assert len(example["labels"]) == len(example["input_ids"])


def test_long_training_rows_are_left_out_and_none_left_is_an_error(task, tokenizer):
    sizes = [len(example["input_ids"]) for example in task.examples(ROWS, tokenizer, None, training=True)]
    assert sizes == [len(q.prompt + r) + 1 for q, r in zip(ROWS.inputs, ROWS.labels, strict=True)]
    some = task.examples(ROWS, tokenizer, sizes[0], training=True)
    assert [len(example["input_ids"]) for example in some] == [size for size in sizes if size <= sizes[0]]
    assert len(task.examples(ROWS, tokenizer, 2, training=False)) == 3, "questions are asked in full"
    with pytest.raises(InputError, match=rf"fits into 7 tokens .* {min(sizes)} to {max(sizes)}; train.max_length=null"):
        task.examples(ROWS, tokenizer, 7, training=True)


def test_what_the_backbone_cannot_read(task, tokenizer):
    long = Rows([Question("a" * 100_000), Question("b")], ["c", "d"])
    assert len(task.examples(long, tokenizer, None, training=True)) == 1
    with pytest.raises(InputError, match=r"has 1000\d\d tokens, but the backbone reads at most 2048"):
        task.examples(long, tokenizer, None, training=False)


@pytest.mark.parametrize("on_inputs", [False, True])
def test_batches_are_padded_on_the_left(tokenizer, on_inputs):
    task = Free(DataSettings(train_on_inputs=on_inputs))
    examples = task.examples(ROWS, tokenizer, None, training=True)
    batch = task.collator(tokenizer)(examples)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        assert batch["input_ids"][row, -size:].tolist() == example["input_ids"]
        assert batch["labels"][row, -size + 1 :].tolist() == example["labels"][1:]
        assert set(batch["labels"][row, : -size + 1].tolist()) <= {IGNORED}
        assert batch["attention_mask"][row].sum() == batch["attention_mask"][row, -size:].sum() == size
        assert batch["position_ids"][row, -size:].tolist() == list(range(size))
    labels = [label for row in batch["labels"].tolist() for label in row]
    assert batch["scored"].tolist() == [place - 1 for place, label in enumerate(labels) if label != IGNORED]
    examples, batch = probes(task, tokenizer)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        assert batch["input_ids"][row, -size:].tolist() == example["input_ids"]
        assert batch["attention_mask"][row].sum() == batch["attention_mask"][row, -size:].sum() == size
        shared = [token for token in batch["shared"][row].tolist() if token != IGNORED]
        read = batch["read_ids"][row, batch["read_mask"][row].bool()].tolist()
        assert read == example["input_ids"] + shared
        for option, ids in enumerate(example["continuations"]):
            rest = ids[len(shared) :]
            assert [*shared, *batch["continuations"][row, option, : len(rest)].tolist()] == ids


def decoder(kind, vocabulary):
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": vocabulary}
    shapes = {
        "llama": {**common, "intermediate_size": 48},
        "qwen2": {**common, "intermediate_size": 48, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": vocabulary},  # whose positions are learned
        "gemma3_text": {
            **common,
            "intermediate_size": 48,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "sliding_window": 8,
        },
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shapes[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from indifferent to what a token reads
            parameter.mul_(4)
    return model


def whole_rows(model, examples):
    """Each row alone, in full: transformers' own loss."""
    total = 0.0
    for example in examples:
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        total = total + model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != IGNORED).sum()
    return total


@pytest.mark.parametrize("on_inputs", [False, True])
@pytest.mark.parametrize("lay", [padded, packed])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma3_text"])
def test_few_scored_positions_give_the_loss_and_gradients_of_all(tokenizer, on_inputs, lay, kind):
    model = decoder(kind, len(tokenizer))
    examples = Free(DataSettings(train_on_inputs=on_inputs)).examples(ROWS, tokenizer, None, training=True)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    outputs, found = batch_loss(model, lay(examples, tokenizer.pad_token_id))
    scored = sum(label != IGNORED for example in examples for label in example["labels"][1:])
    assert outputs.logits.shape[:2] == (1, scored)
    ours = gradients(found)
    expected = whole_rows(model, examples)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    theirs = gradients(expected)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert reads_rows_apart(model, examples, tokenizer.pad_token_id)


def test_packed_rows_are_laid_end_to_end(tokenizer):
    sizes = [3, 9, 4, 2, 5, 9]
    examples = [{"input_ids": [10 + row] * size, "labels": [10 + row] * size} for row, size in enumerate(sizes)]
    batch = packed(examples, 0)
    assert batch["input_ids"].shape == (4, 9)
    rows = {}
    for ids, places, labels in zip(*(batch[k].tolist() for k in ("input_ids", "position_ids", "labels")), strict=True):
        for token, place, label in zip(ids, places, labels, strict=True):
            assert label == (IGNORED if place == 0 else token)
            rows.setdefault(token, []).append(place)
    padding = rows.pop(0)
    assert padding == [0] * (4 * 9 - sum(sizes))
    assert rows == {10 + row: list(range(size)) for row, size in enumerate(sizes)}
    with Cost(torch.nn.Module()) as cost:
        cost._count(torch.nn.Module().train(), (), batch)
    assert cost.metrics(1.0)["tokens_per_second"] == sum(sizes)


def test_a_model_that_reads_packed_rows_into_one_another_is_found(tokenizer):
    model = decoder("llama", len(tokenizer))
    examples = Free().examples(ROWS, tokenizer, None, training=True)
    forward = model.forward
    model.forward = lambda **inputs: forward(**{**inputs, "use_cache": True})  # with which position_ids tell nothing
    assert not reads_rows_apart(model, examples, tokenizer.pad_token_id)


def test_a_lead_is_read_and_does_not_count(task, tokenizer):
    (example, *_), _ = probes(task, tokenizer)
    assert tokenizer.decode(example["continuations"][1]) == "What colour is it"
    assert tokenizer.decode([label for label in example["labels"][1] if label != IGNORED]) == " is it"
    assert tokenizer.decode(example["continuations"][0]) == "Green, of course.<eos>"


def test_an_empty_prompt_begins_with_a_token(task, tokenizer):
    (example,), _ = probes(task, tokenizer, Rows([Question("")], ["yes"]))
    assert example["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.decode(example["continuations"][0]) == "yes<eos>"


def test_a_text_is_apart_where_its_tokens_would_swallow_the_prompts():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "c", "bc"])}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("b", "c")])), eos_token="<eos>"
    )
    assert merging("abc")["input_ids"] == [1, 4]
    assert module._extended(merging, ["ab", "a"], [[1, 2], [1]], ["c", "bc"]) == [[1, 2, 3], [1, 4]]


@torch.no_grad()
def plainly(model, example):
    """log p by one forward pass of the whole, and whether each token is the likeliest."""
    for ids, labels in zip(example["continuations"], example["labels"], strict=True):
        begin = len(example["input_ids"])
        logits = model(torch.tensor([example["input_ids"] + ids])).logits[0, begin - 1 : -1]
        log_probs = logits.log_softmax(-1)[range(len(ids)), ids]
        counted = torch.tensor(labels) != IGNORED
        yield log_probs * counted, (logits.argmax(-1) == torch.tensor(ids)) & counted


@pytest.mark.parametrize("method", ["frozen", "lora", "phi"])
@pytest.mark.parametrize("at_once", [1, 2**27])
def test_a_shared_cache_gives_what_whole_texts_give(task, tokenizer, model, method, at_once, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", at_once)
    model = METHODS[method]().attach(model, METHODS[method].settings(r=2), "CAUSAL_LM").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "phi_B" in name:
                parameter.normal_(std=0.3)
    examples, batch = probes(task, tokenizer)
    log_probs, likeliest = teacher_forced(model, batch)
    for row, example in enumerate(examples):
        for option, (expected, hits) in enumerate(plainly(model, example)):
            torch.testing.assert_close(log_probs[row, option, : len(expected)], expected, rtol=0, atol=1e-4)
            assert torch.equal(likeliest[row, option, : len(expected)], hits)
            assert log_probs[row, option, len(expected) :].abs().sum() == 0
    expected = np.mean([-log_probs[row, 0].sum() / (len(label) + 1) for row, label in enumerate(ROWS.labels)])
    assert response_loss(log_probs, batch).item() == pytest.approx(expected)


class Alike(Free):
    def probe(self, question, response):
        return Probe(question.prompt, tuple(Continuation(f"It is {option}") for option in "abc"))


@pytest.mark.parametrize("at_once", [1, 2**27])
def test_what_all_continuations_begin_with_is_read_with_the_prompt(tokenizer, model, at_once, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", at_once)
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: passes.append(1) or forward(**inputs))
    examples, batch = probes(Alike(), tokenizer)
    log_probs, likeliest = teacher_forced(model, batch)
    assert len(passes) == (1 if at_once > 1 else len(ROWS)), "one pass for a batch"
    monkeypatch.undo()
    for row, example in enumerate(examples):
        for option, (expected, hits) in enumerate(plainly(model, example)):
            torch.testing.assert_close(log_probs[row, option, : len(expected)], expected, rtol=0, atol=1e-4)
            assert torch.equal(likeliest[row, option, : len(expected)], hits)


def test_the_prompt_is_read_once(task, tokenizer, model, monkeypatch):
    lengths, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: lengths.append(inputs["input_ids"].shape) or forward(**inputs)
    )
    _, batch = probes(task, tokenizer)
    teacher_forced(model, batch)
    prompt, *others = lengths
    assert prompt == batch["read_ids"].shape
    assert others == [(3, batch["continuations"].shape[-1] - 1)] * 2


def test_autocast_is_finite_and_close(task, tokenizer, model):
    _, batch = probes(task, tokenizer)
    expected, _ = teacher_forced(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = teacher_forced(model, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_batch_writes_what_its_rows_write_alone(task, tokenizer, model):
    with torch.no_grad():
        for parameter in model.parameters():  # decided enough that no two tokens are near one another
            parameter.mul_(3)
    examples, batch = probes(task, tokenizer)
    together = generate(model, batch, 12)
    assert together.shape == (3, 12)
    alone = [generate(model, task.collator(tokenizer)([example]), 12)[0] for example in examples]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_what_is_written_ends_early_with_padding(task, tokenizer, model):
    _, batch = probes(task, tokenizer)
    model.generation_config.eos_token_id = list(range(2, len(tokenizer)))  # whatever it writes is an end
    written = generate(model, batch, 4)
    assert written.shape == (3, 4)
    assert set(written[:, 1:].flatten().tolist()) == {tokenizer.pad_token_id}


# --- files ---


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_instructions_are_read_with_and_without_a_mark(tmp_path):
    text = json.dumps(
        [{"instruction": "Add.", "output": "3", "extra": 1}, {"instruction": "é", "input": "x", "output": ""}]
    )
    expected = [Instruction("Add.", "", "3"), Instruction("é", "x", "")]
    for content in (text, b"\xef\xbb\xbf" + text.encode()):
        assert read_instructions(write(tmp_path / "rows.json", content)) == expected
    assert expected[1].prompt == alpaca_prompt("é", "x")


GOOD = {"instruction": "Add.", "input": "", "output": "3"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON: .*line 1 column 2"),
        ("", "is not JSON"),
        (b"[\xff]", "is not UTF-8: .* at byte 1"),
        ("[]", "at least one"),
        ('{"instruction": "Add."}', "must hold a list of rows"),
        (json.dumps([GOOD, 7]), "row 2 must be an object, got int"),
        (json.dumps([GOOD, GOOD, {"instruction": "Add."}]), "row 3 needs a text called 'output', which is missing"),
        (json.dumps([{**GOOD, "instruction": 5}]), "row 1 needs a text called 'instruction', got 5"),
        (json.dumps([{**GOOD, "output": "ab\ud83d"}]), "row 1: 'output' has half a character at 2"),
        (json.dumps([{**GOOD, "input": None}]), "row 1 needs a text called 'input', got None"),
    ],
)
def test_bad_files_are_named_with_their_row(tmp_path, content, message):
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(InputError, match=message) as raised:
        read_instructions(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_instructions(tmp_path / "none.json")


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.sampled_from(["instruction", "input", "output", "answer"]) | st.text()
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


@given(content=values.map(json.dumps) | st.text())
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "rows.json"
    path.write_text(content, encoding="utf-8", newline="")
    try:
        rows = read_instructions(path)
    except InputError:
        return
    assert rows
    assert all(isinstance(row, Instruction) for row in rows)
