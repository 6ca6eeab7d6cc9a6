"""4-bit recovery: the rounding, the models that are held against what they were, and the task."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from basisadapt import InputError, backbones
from basisadapt.backbones import rounded as parts
from basisadapt.backbones.rounded import RoundedEncoder, RoundedLanguageModel, normal_float, rounded
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.study.plan.tuning import resolve_tuning
from basisadapt.tasks import TASKS, Rows
from basisadapt.tasks.docstrings import Docstrings
from basisadapt.training import load_data, plan, run
from basisadapt.training.config import RunConfig

# Dettmers et al. (2023), appendix E.
PUBLISHED = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
TEXTS = ["a text of some words", "another one", "and one that is longer than both of the others are"]


def config(backbone, method="lora", task="recovery/states", weights="fp32", adapter=None, **train):
    train = {"batch_size": 8, "max_steps": 2, "train_rows": 24, "eval_rows": 16, "max_length": 16, **train}
    return RunConfig.from_mapping(
        {
            "task": task,
            "backbone": str(backbone),
            "method": method,
            "adapter": {"r": 4, **(adapter or {})},
            "train": {"weights": weights, **train},
            "seed": 1,
        }
    )


def test_the_values_are_the_published_ones():
    published = torch.tensor([float(value) for value in PUBLISHED.split()], dtype=torch.float64)
    torch.testing.assert_close(normal_float(), published, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 64), (3, 50), (1, 1), (64, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_becomes_the_nearest_value_of_its_group(shape, dtype):
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=dtype)
    found = rounded(W)
    assert (found.shape, found.dtype) == (W.shape, dtype)
    values = normal_float().to(dtype)
    for group, of_group in zip(W.flatten().split(64), found.flatten().split(64), strict=True):
        possible = group.abs().max() * values
        distances = (group[:, None] - possible).abs()
        torch.testing.assert_close((group - of_group).abs(), distances.min(dim=1).values)
    torch.testing.assert_close(rounded(found), found)


def test_zeros_stay():
    W = torch.zeros(2, 100)
    W[1, 40:] = 0.3
    assert torch.equal(rounded(W), W)


def saved(folder, whole):
    """A folder with a model, and the tokenizer of the fixture beside it."""
    whole.save_pretrained(folder)
    return folder


@torch.no_grad()
def rounded_by_hand(whole, stack):
    """A copy whose linear layers of the blocks are rounded, found by their names."""
    twin = copy.deepcopy(whole)
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{stack}." in name:
            module.weight.copy_(rounded(module.weight))
    return twin


def compared(form, folder, texts=TEXTS):
    """The model of the form, a batch of the task, and its examples."""
    model, before = backbones.load(backbones.find(str(folder)), form, 1)
    task = next(TASKS[name]() for name in TASKS if TASKS[name].form == form)
    examples = task.examples(Rows(texts, [0] * len(texts)), before, 64, False)
    return model.eval(), task, task.collator(before)(list(examples)), examples


@torch.no_grad()
def test_an_encoder_is_held_against_itself(encoder):
    """Row by row, without padding, by the whole model of transformers."""
    model, task, batch, examples = compared("rounded_encoder", encoder)
    assert isinstance(model, RoundedEncoder)
    whole = transformers.AutoModel.from_pretrained(encoder).eval()
    twin = rounded_by_hand(whole, "layer")
    for name, parameter in model.bert.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))
    loss, scores = task.score(model, batch)
    expected = []
    for example in examples:
        ids = example["input_ids"][None]
        before, after = (one(ids).last_hidden_state for one in (whole, twin))
        torch.testing.assert_close(example["targets"], before[0])
        expected.append(((after - before).square().sum() / before.square().sum()).item())
    assert min(expected) > 1e-6
    torch.testing.assert_close(scores[:, 0, 0], torch.tensor(expected))
    torch.testing.assert_close(scores[:, 1], scores[:, 0], msg="no adapter: rounded, as it was")
    assert scores[:, 2].max() < 1e-9
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_language_model_is_held_against_itself(language_model, tied, tmp_path, monkeypatch):
    """Row by row, without padding, by the whole model of transformers; logits in parts as small as can be."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(language_model, tie_word_embeddings=tied).eval()
    whole.lm_head.weight.mul_(20)  # random weights predict nothing else
    folder = saved(tmp_path, whole)
    transformers.AutoTokenizer.from_pretrained(language_model).save_pretrained(folder)
    monkeypatch.setattr(parts, "LOGITS", 1)
    parts._loaded.cache_clear()
    model, task, batch, examples = compared("rounded_language_model", folder)
    assert isinstance(model, RoundedLanguageModel)
    twin = rounded_by_hand(whole, "layers")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))
    _, scores = task.score(model, batch)
    for row, example in enumerate(examples):
        ids = example["input_ids"]
        before, after = (one(ids[None]).logits[0].log_softmax(-1) for one in (whole, twin))
        divergence = (before.exp() * (before - after)).sum(-1).mean()
        assert divergence > 1e-4
        losses = [functional.nll_loss(one[:-1], ids[1:]) for one in (after, after, before)]
        torch.testing.assert_close(scores[row, :, 1], torch.stack(losses), rtol=1e-4, atol=1e-5)
        expected = torch.stack([divergence, divergence, torch.zeros(())])
        torch.testing.assert_close(scores[row, :, 0], expected, rtol=1e-3, atol=1e-6)


def test_the_share_that_is_recovered():
    """Of means over rows, and for each number; negative where an adapter does harm."""
    scores = np.array([[[3.0, 5.0], [4.0, 6.0], [0.0, 4.0]], [[1.0, 5.0], [4.0, 8.0], [0.0, 2.0]]], dtype=np.float32)
    found = TASKS["recovery/text"]().measure(scores, Rows(["", ""], [0, 0]), None)
    assert found == pytest.approx(
        {
            "recovered": 0.5,
            "divergence": 2.0,
            "divergence.rounded": 4.0,
            "divergence.before": 0.0,
            "recovered.text_loss": 0.5,
            "text_loss": 5.0,
            "text_loss.rounded": 7.0,
            "text_loss.before": 3.0,
        }
    )
    harm = TASKS["recovery/states"]().measure(np.array([[[6.0], [4.0], [0.0]]]), Rows([""], [0]), None)
    assert harm["recovered"] == pytest.approx(-0.5)


def test_the_texts_are_those_of_docstrings(encoder):
    data, known = load_data(config(encoder)), Docstrings().load(None)
    assert data.train.inputs == known.train.inputs
    assert data.eval.inputs == known.eval.inputs
    assert not set(data.train.inputs) & set(data.eval.inputs)


PHI = {"num_basis": 8, "omega_init": "nyquist", "gain": "normalised:1"}


@pytest.mark.parametrize(
    ("method", "adapter", "rate"),
    [("lora", {}, 0.02), ("phi", PHI, 0.02), ("kradapter", {}, 0.02), ("full", {}, 1e-4)],
)
@pytest.mark.parametrize("task", ["recovery/states", "recovery/text"])
def test_some_of_it_is_recovered(task, method, adapter, rate, encoder, language_model):
    backbone = encoder if task == "recovery/states" else language_model
    result = run(config(backbone, method, task, adapter=adapter, lr=rate, max_steps=40, max_grad_norm=10))
    metrics = result.metrics
    assert result.status == "finished"
    assert result.headline == "recovered"
    assert metrics["recovered"] > 0.05
    assert metrics["eval_loss"] == pytest.approx(metrics["divergence"], rel=1e-4)
    assert metrics["divergence"] < metrics["divergence.rounded"]
    assert metrics["parameters.head"] == 0
    if method != "full":
        assert len(result.modules) == (12 if task == "recovery/states" else 14)


def test_a_process_reads_the_model_before_once(encoder, monkeypatch):
    parts._loaded.cache_clear()
    copied, rounding = [], RoundedEncoder.round_weights
    monkeypatch.setattr(RoundedEncoder, "round_weights", lambda model: copied.append(model) or rounding(model))
    for rate in (1e-3, 1e-2):
        run(config(encoder, lr=rate))
    assert len(copied) == 3, "what is compared with, and the model of each run"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "roberta-base"}, r"cannot be rounded to 4 bits .*recovery/states.*, minilm can"),
        ({"backbone": "pythia-1.4b", "task": "recovery/text"}, "cannot be rounded to 4 bits .*, qwen2.5-coder-0.5b, "),
        ({"backbone": "minilm", "weights": "bf16"}, "'recovery/states' rounds the weights itself; .* must be fp32"),
        ({"backbone": "minilm", "max_length": 600}, "train.max_length must be at most 512, the positions of"),
    ],
)
def test_what_has_no_meaning_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        plan(config(**values))


def test_a_model_that_rounding_does_not_change_is_refused(encoder, tmp_path):
    twin = rounded_by_hand(rounded_by_hand(transformers.AutoModel.from_pretrained(encoder), "layer"), "layer")
    folder = saved(tmp_path, twin)
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    with pytest.raises(InputError, match="rounding its weights to 4 bits changes none of them"):
        run(config(folder))


def test_the_study():
    """Rows differ in their method alone; each is tried with the same rates, on the last fifth of the training rows."""
    spec = read_spec("recovery")
    for preset, task, backbone in (
        ("smoke", "recovery/states", "minilm"),
        ("quick", "recovery/states", "minilm"),
        ("llm", "recovery/text", "qwen2.5-coder-0.5b"),
    ):
        tuning, study = resolve_tuning(spec, preset=preset), resolve(spec, preset=preset)
        configs = [cell.config for cell in (*study.cells, *tuning.trials)]
        assert {(one.task, one.backbone) for one in configs} == {(task, backbone)}
        assert {cell.config.train.validation for cell in study.cells} == {None}
        assert {cell.config.train.validation for cell in tuning.trials} == ({0.2} if preset == "llm" else set())
        assert not {cell.seed for cell in study.cells} & {cell.seed for cell in tuning.trials}
        rates = {tuple(one.row.cells[0].config.train.lr for one in of_row) for of_row in tuning.candidates}
        assert len(rates) == 1
        trains = {replace(one.train, lr=1.0, validation=None) for one in configs}
        steps = {train.max_steps for train in trains}
        assert len(trains) == len(steps) == (2 if preset == "llm" else 1), "and twice as many"
