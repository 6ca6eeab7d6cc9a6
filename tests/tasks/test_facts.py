"""Random facts, and the feed-forward block that stores them."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
import transformers

from basisadapt import InputError, backbones
from basisadapt.backbones import bert_parts
from basisadapt.backbones.bert_parts import FeedForwardInputs, LastFeedForward
from basisadapt.tasks import DataSettings, facts
from basisadapt.tasks.facts import DictionaryStates, DictionaryText, Facts, TextFacts
from basisadapt.training import load_data, plan, run
from basisadapt.training.config import RunConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", "17", *"abcdefghijklmnopqrst"]
FIRST, LAST = 2, 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a two-layer BERT with random weights and twenty words."""
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("bert", vocab_size=len(WORDS), initializer_range=0.3, **small)
    )
    model.save_pretrained(folder)
    return folder


def config(backbone, method="lora", seed=1, facts=12, adapter=None, task="facts", **train):
    return RunConfig.from_mapping(
        {
            "task": task,
            "backbone": str(backbone),
            "method": method,
            "adapter": {"r": 4, **(adapter or {})},
            "data": {"facts": facts},
            "train": {"batch_size": facts, "max_steps": 3, **train},
            "seed": seed,
        }
    )


def test_facts_follow_from_the_seed(bert):
    first, again, other = (load_data(config(bert, seed=seed)) for seed in (1, 1, 2))
    assert first.train == first.eval == again.train
    assert first.train.inputs != other.train.inputs
    assert first.train.labels != other.train.labels
    assert first.fingerprint() == other.fingerprint(), "the seed tells them apart already"
    assert first.fingerprint() != load_data(config(bert, facts=13)).fingerprint()
    assert len(first.train) == 12
    assert {len(key) for key in first.train.inputs} == {4}
    assert set(load_data(config(bert, facts=5000)).train.labels) == set(range(256))


def test_bits_and_recall():
    """n (8 − H), H the mean cross-entropy in bits."""
    task, rows = Facts(DataSettings(facts=50)), Facts(DataSettings(facts=50)).of_seed(3).train
    nothing = task.measure(np.zeros((50, 256), dtype=np.float32), rows, None)
    assert nothing["bits"] == pytest.approx(0, abs=1e-9)
    logits = np.random.default_rng(0).normal(size=(50, 256))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    of_labels = [p[i, label] for i, label in enumerate(rows.labels)]
    expected = sum(8 + math.log2(one) for one in of_labels)
    known = sum(one == p[i].max() for i, one in enumerate(of_labels))
    assert task.measure(logits, rows, None) == {"bits": pytest.approx(expected), "recall": pytest.approx(known / 50)}
    everything = 100 * np.eye(256)[rows.labels]
    assert task.measure(everything, rows, None) == {"bits": pytest.approx(400), "recall": 1.0}


def test_a_key_is_computed_once():
    task, asked = Facts(DataSettings(facts=6)), []

    def below(keys):
        asked.extend(keys)
        return torch.tensor(keys, dtype=torch.float64)

    rows = task.of_seed(0).train
    first, second = (task.examples(rows, below, None, training) for training in (True, False))
    part = task.examples(rows.take([4, 1]), below, None, False)
    assert asked == [tuple(key) for key in rows.inputs]
    assert [example["labels"] for example in first] == list(rows.labels)
    for example, other, key in zip(first, second, rows.inputs, strict=True):
        assert example["hidden"].tolist() == other["hidden"].tolist() == [float(number) for number in key]
    assert [example["hidden"].tolist() for example in part] == [[float(n) for n in rows.inputs[i]] for i in (4, 1)]


def test_runs_of_a_process_share_what_lies_below(bert, monkeypatch):
    """The encoder is read once, and embeds a fact once, for training and for both evaluations of all runs of a seed."""
    bert_parts._loaded.cache_clear()
    read, load = [], bert_parts.BertModel.from_pretrained
    embedded, embed = [], FeedForwardInputs.__call__
    monkeypatch.setattr(bert_parts.BertModel, "from_pretrained", lambda *a, **k: read.append(a) or load(*a, **k))
    monkeypatch.setattr(FeedForwardInputs, "__call__", lambda below, keys: embedded.extend(keys) or embed(below, keys))
    for lr in (1e-3, 1e-2):
        run(config(bert, facts=14, lr=lr))
    assert read == [(str(bert),)]
    assert embedded == [tuple(key) for key in load_data(config(bert, facts=14)).train.inputs]


def test_an_encoder_that_has_changed_on_the_disk_is_read_again(bert, tmp_path):
    folder, keys = shutil.copytree(bert, tmp_path / "bert"), [[1, 2], [3, 4]]
    before = FeedForwardInputs.from_pretrained(str(folder))(keys)
    assert torch.equal(FeedForwardInputs.from_pretrained(str(folder))(keys), before)
    changed = transformers.AutoModel.from_pretrained(folder)
    changed.embeddings.word_embeddings.weight.data.mul_(2)
    changed.save_pretrained(folder)
    assert not torch.equal(FeedForwardInputs.from_pretrained(str(folder))(keys), before)


@torch.no_grad()
def test_the_block_is_the_end_of_the_whole_model(bert):
    """C times the whole model's hidden state of [CLS], for keys of words and of nothing else."""
    torch.manual_seed(5)
    model, below = backbones.load(backbones.find(str(bert)), "feed_forward", 256)
    assert isinstance(model, LastFeedForward)
    assert isinstance(below, FeedForwardInputs)
    whole = transformers.AutoModel.from_pretrained(bert).eval()
    assert {name for name, _ in model.named_parameters()} < {name for name, _ in whole.named_parameters()}
    keys = np.random.default_rng(1).integers(2**31, size=(130, 4))
    words = len(WORDS) - 7
    ids = torch.cat([torch.full((130, 1), FIRST), torch.tensor(keys % words) + 7, torch.full((130, 1), LAST)], dim=1)
    expected = whole(ids).last_hidden_state[:, 0] @ model.classes.T
    hidden = below(keys.tolist())
    labels = torch.arange(130) % 256
    for mode in (model.eval(), model.train()):  # dropout has no say
        output = mode(hidden=hidden, labels=labels)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(expected, labels))
    assert model.classes.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
    assert not any(name == "classes" for name, _ in model.named_parameters())


def test_the_classes_follow_from_the_seed(bert):
    drawn = []
    for seed in (1, 2, 1):
        transformers.set_seed(seed)
        model, _ = backbones.load(backbones.find(str(bert)), "feed_forward", 256)
        drawn.append(model.classes)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.1), ("phi", 0.03), ("sinelora", 0.03), ("full", 0.01)])
def test_facts_are_stored(bert, method, rate, tmp_path):
    result = run(config(bert, method, lr=rate, max_steps=30, max_grad_norm=10), save_to=tmp_path)
    assert result.status == "finished"
    assert result.headline == "bits"
    assert result.metrics["bits"] > 15, "nothing is stored at the start"
    assert result.metrics["bits"] == pytest.approx(12 * (8 - result.metrics["eval_loss"] / math.log(2)), rel=1e-4)
    assert result.metrics["recall"] > 0.1, "against 1 / 256 at the start"
    assert result.metrics["parameters.head"] == 0
    assert "generalisation_gap" not in result.metrics, "nothing is held out"
    if method != "full":
        modules = {"encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"}
        assert set(result.modules) == modules
        assert {numbers["kind"] for numbers in result.modules.values()} == {"mlp"}


def test_the_block_may_be_held_in_half_precision(bert):
    halves = [run(config(bert, lr=0.1, max_steps=20, weights=weights)).metrics["bits"] for weights in ("fp32", "bf16")]
    assert halves[1] == pytest.approx(halves[0], rel=0.1)


def test_a_run_may_keep_its_best_checkpoint(bert):
    """Which the Trainer writes together with what makes the inputs."""
    assert run(config(bert, lr=0.1, max_steps=4, eval_steps=2)).status == "finished"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"facts": 0}}, "data.facts must be at least 1 and at most 1,000,000, got 0"),
        ({"data": {"facts": 10**7}}, "at most 1,000,000"),
        ({"train": {"validation": 0.2}}, "train.validation evaluates on training rows, which task 'facts' cannot"),
        ({"backbone": "qwen2-0.5b"}, r"cannot store facts .*, minilm can"),
        ({"backbone": "roberta-base"}, r"cannot store facts .*, minilm can"),
        ({"method": "head"}, "this model has none"),
    ],
)
def test_what_has_no_meaning_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        plan(RunConfig.from_mapping({"task": "facts", **values}), dry=True)


LETTERS = [f"{a} b c d e f g {b} i j k l m n" for a in "apqr" for b in "hst"]


@pytest.fixture
def texts(monkeypatch):
    """Texts in the words of the tiny encoder."""
    monkeypatch.setattr(facts, "_texts", lambda part, setting, count: LETTERS[:count])
    return LETTERS


def with_texts(backbone, **train):
    values = config(backbone, **train).to_mapping()
    return RunConfig.from_mapping({**values, "data": {**values["data"], "probes": 8}})


@torch.no_grad()
def test_a_text_is_what_the_whole_model_makes_of_it(bert):
    below = FeedForwardInputs.from_pretrained(str(bert))
    whole, tokenizer = (
        transformers.AutoModel.from_pretrained(bert).eval(),
        transformers.AutoTokenizer.from_pretrained(bert),
    )
    hidden = below.read(LETTERS, 4, 8)
    expected = whole(tokenizer([text[: 2 * 12] for text in LETTERS], return_tensors="pt")["input_ids"])
    torch.testing.assert_close(below.above(hidden), expected.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)


def test_what_is_forgotten_is_a_divergence():
    """Mean KL of after from before over the texts alone, in bits; facts are measured as without texts."""
    task = Facts(DataSettings(facts=6, probes=3))
    rows = task.of_seed(2).eval
    assert [isinstance(one, str) for one in rows.inputs] == [False] * 6 + [True] * 3
    assert len(task.of_seed(2).train) == 6
    logits = np.random.default_rng(0).normal(size=(9, 2, 256))
    after, before = np.exp(logits[6:, 0]), np.exp(logits[6:, 1])
    p, q = before / before.sum(-1, keepdims=True), after / after.sum(-1, keepdims=True)
    found = task.measure(logits, rows, None)
    assert found["forgotten"] == pytest.approx((p * np.log2(p / q)).sum(-1).mean())
    assert found["kept"] == np.mean(p.argmax(-1) == q.argmax(-1))
    stored = Facts(DataSettings(facts=6)).measure(logits[:6, 0], rows.head(6), None)
    assert {name: found[name] for name in stored} == stored
    same = task.measure(logits[:, [1, 1]], rows, None)
    assert (same["forgotten"], same["kept"]) == (pytest.approx(0, abs=1e-12), 1)


def test_a_run_tells_what_it_forgets_and_stores_what_it_does_without_texts(bert, texts):
    still = run(with_texts(bert, lr=1e-12, max_steps=1)).metrics
    assert (still["forgotten"], still["kept"]) == (pytest.approx(0, abs=1e-9), 1)
    with_, without = (run(one).metrics for one in (with_texts(bert, lr=0.1), config(bert, lr=0.1)))
    assert with_["forgotten"] > 1e-3
    assert with_["kept"] <= 1
    assert with_["bits"] == pytest.approx(without["bits"], rel=1e-6)
    assert with_["recall"] == without["recall"]


def test_the_texts_are_real_and_there_may_be_too_few():
    first, more = (facts._texts("eval", "probes", count) for count in (3, 200))
    assert more[:3] == first
    assert min(len(text.split()) for text in more) >= 12
    assert len({tuple(text.split()[:4]) for text in more}) == 200, "an encoder's first tokens would be the same"
    assert not set(more) & set(facts._texts("train", "facts", 500)), "texts that are facts tell nothing of forgetting"
    with pytest.raises(InputError, match=r"data.probes must be at most [0-9]+, the texts that there are, got 1000000"):
        facts._texts("eval", "probes", 1_000_000)
    for task, settings in ((Facts, {"facts": 6, "probes": 10**6}), (TextFacts, {"facts": 10**6})):
        with pytest.raises(InputError, match="the texts that there are, got 1000000"):
            task(DataSettings(**settings)).check(None)
    with pytest.raises(InputError, match=r"data\.probes must be at least 0"):
        DataSettings(probes=-1)


def test_other_texts_are_other_data():
    one, other = (Facts(DataSettings(facts=6, probes=count)).of_seed(1).fingerprint() for count in (3, 4))
    assert len({one, other, Facts(DataSettings(facts=6)).of_seed(1).fingerprint()}) == 3


def test_facts_may_be_of_real_texts(bert, texts):
    """The same texts for every seed, with other classes; the model reads them as it does other texts."""
    task = TextFacts(DataSettings(facts=5, probes=3))
    first, other = task.of_seed(1), task.of_seed(2)
    assert first.train.inputs == other.train.inputs == LETTERS[:5]
    assert first.train.labels != other.train.labels
    assert len(first.eval) == 8
    logits = np.zeros((8, 2, 256))
    logits[np.arange(5), 0, first.train.labels] = 100
    assert task.measure(logits, first.eval, None)["recall"] == 1
    values = {**config(bert, task="facts/texts", lr=0.1, max_steps=60).to_mapping(), "data": {"facts": 8}}
    assert run(RunConfig.from_mapping(values)).metrics["bits"] > 0.2 * 8 * 8


@pytest.mark.parametrize("task", [DictionaryStates, DictionaryText])
def test_a_dictionary_is_asked_in_new_sentences(task):
    """Every word has one translation in four sentences and in a fifth; only the first two words of a key differ."""
    made = task(DataSettings(facts=7, probes=2))
    data, other = made.of_seed(3), made.of_seed(4)
    seen, asked = data.train, data.eval.head(7)
    assert (len(seen), len(data.eval)) == (28, 9)
    assert data.train.inputs != other.train.inputs
    words = [tuple(key[2:4]) for key in asked.inputs]
    known = dict(zip(words, map(str, asked.labels), strict=True))
    assert len(known) == 7
    assert [tuple(key[2:4]) for key in seen.inputs] == words * 4
    assert [known[tuple(key[2:4])] for key in seen.inputs] == [str(label) for label in seen.labels]
    sentences = [tuple(key[:4]) for key in (*seen.inputs, *asked.inputs)]
    assert len(set(sentences)) == 35
    assert [isinstance(one, str) for one in data.eval.inputs[7:]] == [True, True]
    if task is DictionaryText:
        assert all(key[4:] == label for key, label in zip(seen.inputs, seen.labels, strict=True))


def test_a_word_is_known_where_it_was_not_seen(bert):
    result = run(config(bert, task="dictionary/states", facts=6, lr=0.1, max_steps=150))
    assert result.metrics["bits"] > 0.1 * 6 * 8
    assert result.data["train_rows"] == 24
    assert result.data["eval_rows"] == 6
