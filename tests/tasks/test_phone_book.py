"""Random facts in a language model: the phone book, and the last MLP that stores it."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import string

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from basisadapt import InputError, backbones
from basisadapt.backbones import last_mlp
from basisadapt.backbones.last_mlp import LastMLP, MLPInputs
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.tasks import DataSettings, facts
from basisadapt.tasks.facts import CLASSES, KEY, VALUE, PhoneBook
from basisadapt.training import load_data, plan, run
from basisadapt.training.config import RunConfig
from tests.tasks.test_facts import config as of_facts

OTHERS = ["<pad>", "<eos>", "x", "Ġ1", "Ġé", "xy"]  # tokens that are no whole words
WORDS = [f"Ġ{a}{b}" for a, b in itertools.product(string.ascii_lowercase[:18], repeat=2)]
SMALL = {
    "vocab_size": len(OTHERS) + len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def save(folder, model_type, vocabulary, **config):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="x"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shapes = transformers.AutoConfig.for_model(model_type, **{**SMALL, **config})
    transformers.AutoModelForCausalLM.from_config(shapes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("qwen2", True), ("llama", False)], ids=["qwen2, tied", "llama, untied"])
def backbone(request, tmp_path_factory):
    """The folder of a two-layer language model with random weights."""
    model_type, tied = request.param
    folder = tmp_path_factory.mktemp(model_type)
    return save(folder, model_type, [*OTHERS, *WORDS], tie_word_embeddings=tied)


config = functools.partial(of_facts, facts=6, task="phone_book")


def test_facts_follow_from_the_seed(backbone):
    first, again, other = (load_data(config(backbone, seed=seed)).train for seed in (1, 1, 2))
    assert first == again
    assert first.inputs != other.inputs
    assert {len(one) for one in first.inputs} == {KEY + VALUE}
    assert [one[KEY:] for one in first.inputs] == first.labels
    classes = np.array(load_data(config(backbone, facts=500)).train.labels)
    assert set(classes.flatten()) == set(range(CLASSES))


def test_bits_and_recall():
    """n (8 − H) over the words of all values; a fact is recalled whole or not."""
    task = PhoneBook(DataSettings(facts=5))
    rows = task.of_seed(3).train
    logits = np.random.default_rng(0).normal(size=(5, VALUE, CLASSES))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    right = np.take_along_axis(p, np.array(rows.labels)[..., None], axis=-1)
    expected = sum(8 + math.log2(one) for one in right.flatten())
    assert task.measure(logits, rows, None) == {"bits": pytest.approx(expected), "recall": 0.0}
    known = 100 * np.eye(CLASSES)[np.array(rows.labels)]
    assert task.measure(known, rows, None) == {"bits": pytest.approx(5 * VALUE * 8), "recall": 1.0}
    known[1, 3] = known[4, 0] = known[4, 1] = 0
    assert task.measure(known, rows, None)["recall"] == pytest.approx(3 / 5)


@torch.no_grad()
def test_the_mlp_is_the_end_of_the_whole_model(backbone):
    """Its logits are those that the whole model has for the 256 words, at each word of a value."""
    model, below = backbones.load(backbones.find(str(backbone)), "last_mlp", CLASSES)
    assert isinstance(model, LastMLP)
    assert isinstance(below, MLPInputs)
    whole = transformers.AutoModelForCausalLM.from_pretrained(backbone).eval()
    assert {name for name, _ in model.named_parameters()} < {name for name, _ in whole.named_parameters()}
    rows = PhoneBook(DataSettings(facts=130)).of_seed(0).train
    classes = torch.tensor([len(OTHERS) + place * len(WORDS) // CLASSES for place in range(CLASSES)])
    values = torch.tensor(rows.labels)
    keys = torch.tensor([one[:KEY] for one in rows.inputs]) % len(WORDS) + len(OTHERS)
    logits = whole(torch.cat([keys, classes[values]], dim=1)).logits
    expected = logits[:, KEY - 1 : -1, classes]
    task = PhoneBook(DataSettings(facts=130))
    batch = task.collator(below)(list(task.examples(rows, below, None, training=True)))
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    entropy = torch.nn.functional.cross_entropy(expected.flatten(0, 1), values.flatten())
    torch.testing.assert_close(output.loss, entropy)


def test_a_process_reads_the_whole_model_once(backbone, monkeypatch):
    last_mlp._loaded.cache_clear()
    read, load = [], transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        last_mlp.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: read.append(a) or load(*a, **k)
    )
    for seed in (1, 2):
        run(config(backbone, seed=seed))
    assert read == [(str(backbone),)]


PHI = {"num_basis": 16, "omega_init": "nyquist", "gain": "normalised:1"}


@pytest.mark.parametrize(
    ("method", "adapter", "rate"),
    [("lora", {}, 0.1), ("phi", PHI, 0.1), ("kradapter", {}, 0.1), ("randlora", {"r": 24}, 0.1), ("full", {}, 0.01)],
)
def test_facts_are_stored(backbone, method, adapter, rate):
    result = run(config(backbone, method, adapter=adapter, lr=rate, max_steps=60, max_grad_norm=10))
    assert result.status == "finished"
    assert result.headline == "bits"
    assert result.metrics["bits"] > 0.2 * 6 * VALUE * 8
    stored = 6 * VALUE * (8 - result.metrics["eval_loss"] / math.log(2))
    assert result.metrics["bits"] == pytest.approx(stored, rel=1e-4)
    assert result.metrics["parameters.head"] == 0
    if method != "full":
        assert set(result.modules) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}


TEXTS = np.random.default_rng(0).integers(len(WORDS), size=(70, KEY + VALUE + 3)) + len(OTHERS)


def tokens_of(numbers, add_special_tokens):
    """The texts with these numbers, of which no tokenizer knows."""
    return {"input_ids": [TEXTS[int(number)].tolist() for number in numbers]}


@torch.no_grad()
def test_a_text_is_what_the_whole_model_makes_of_it(backbone):
    """Read at the tokens before those of a value; the head's rows make its logits."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(backbone).eval()
    below = MLPInputs(transformers.AutoTokenizer.from_pretrained(backbone), copy.deepcopy(whole))
    below._tokenizer = tokens_of
    hidden = below.read([str(number) for number in range(70)], KEY, VALUE)
    expected = whole.model(torch.tensor(TEXTS[:, : KEY + VALUE])).last_hidden_state[:, KEY - 1 : -1]
    torch.testing.assert_close(below.above(hidden), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("lora", "phone_book"),
        ("full", "phone_book"),
        ("lora", "dictionary/text"),
        ("lora", "edits"),
        ("lora", "cipher/text"),
        ("lora", "modular/add/text"),
    ],
)
def test_a_run_tells_what_it_forgets(backbone, method, task, monkeypatch):
    monkeypatch.setattr(facts, "_texts", lambda part, setting, count: [str(number) for number in range(count)])
    read = MLPInputs.read

    def as_numbers(below, *given):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(below, "_tokenizer", tokens_of)
            return read(below, *given)

    monkeypatch.setattr(MLPInputs, "read", as_numbers)

    def metrics(**train):
        values = config(backbone, method, task=task, **train).to_mapping()
        return run(RunConfig.from_mapping({**values, "data": {**values["data"], "probes": 70}})).metrics

    still, trained = metrics(lr=1e-12, max_steps=1), metrics(lr=0.01, max_steps=10)
    assert (still["forgotten"], still["kept"]) == (pytest.approx(0, abs=1e-5), 1)
    assert trained["forgotten"] > 1e-3
    assert "eval_loss" not in trained, "a batch of texts alone has none"


def test_edits_are_of_real_texts(backbone, monkeypatch):
    """The next word after eleven tokens, of the same texts for every seed; what the model says of them is stored."""
    numbers = [str(number) for number in range(6)]
    monkeypatch.setattr(facts, "_texts", lambda part, setting, count: numbers[:count])
    first, other = (load_data(config(backbone, task="edits", seed=seed)).train for seed in (1, 2))
    assert first.inputs == other.inputs == numbers
    assert first.labels != other.labels
    asked = []
    monkeypatch.setattr(MLPInputs, "read", lambda below, texts, *read: asked.append(read) or torch.randn(6, 1, 24))
    result = run(config(backbone, task="edits", lr=0.1, max_steps=60, max_grad_norm=10))
    assert result.metrics["bits"] > 0.2 * 6 * 8
    assert set(asked) == {(11, 1)}


def test_a_translation_is_the_word_that_follows(backbone):
    result = run(config(backbone, task="dictionary/text", lr=0.1, max_steps=60, max_grad_norm=10))
    assert result.metrics["bits"] > 0.2 * 6 * 8
    assert result.data["train_rows"] == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "minilm"}, "cannot store words in its last MLP .*, qwen2.5-coder-0.5b, llama3-8b can"),
        ({"backbone": "phi3-mini"}, "cannot store words in its last MLP"),
        ({"train": {"validation": 0.2}}, "which task 'phone_book' cannot"),
    ],
)
def test_what_has_no_meaning_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        plan(RunConfig.from_mapping({"task": "phone_book", "backbone": "qwen2-0.5b", **values}), dry=True)


def test_a_vocabulary_may_have_too_few_words(tmp_path):
    folder = save(tmp_path, "llama", [*OTHERS, *WORDS[:200]], vocab_size=len(OTHERS) + 200)
    with pytest.raises(InputError, match="its vocabulary has 200 words, and 256 are needed for values"):
        run(config(folder))


def test_the_language_model_of_the_study():
    """Each row is tried with five rates on other facts; twice the steps differ in nothing but the steps."""
    tuning = resolve_tuning(read_spec("capacity"), preset="llm")
    configs = [candidate.row.cells[0].config for of_row in tuning.candidates for candidate in of_row]
    assert {(one.task, one.backbone) for one in configs} == {("phone_book", "qwen2.5-coder-0.5b")}
    assert {one.train.batch_size for one in configs} == {one.data.facts for one in configs} == {1024}
    assert {len(of_row) for of_row in tuning.candidates} == {5}
    rows = {of_row[0].row.label: of_row[0].row.cells[0].config for of_row in tuning.candidates}
    assert {rows[f"phi, {r}"].adapter.r for r in (1, 2, 4, 8)} == {1, 2, 4, 8}
    for name in ("lora", "phi"):
        twice, once = rows[f"{name} for twice the steps, 1"].to_mapping(), rows[f"{name}, 1"].to_mapping()
        assert twice["train"].pop("max_steps") == 2 * once["train"].pop("max_steps")
        assert twice == once
