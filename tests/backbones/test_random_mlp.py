"""The MLP with random weights, and its inputs."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from basisadapt import InputError, backbones
from basisadapt.backbones.checkpoint import Checkpoint
from basisadapt.backbones.random_mlp import RandomMLP, RandomVectors
from basisadapt.tasks import DataSettings
from basisadapt.tasks.facts import VectorFacts
from basisadapt.training import plan, run
from basisadapt.training.config import RunConfig

WIDTH = 128


def config(depth=2, method="lora", **values):
    train = {"batch_size": 12, "max_steps": 3, **values.pop("train", {})}
    chosen = {"task": "facts/vectors", "backbone": f"random-mlp-{depth}", "method": method, "adapter": {"r": 2}}
    return RunConfig.from_mapping({**chosen, "data": {"facts": 12}, "train": train, "seed": 1, **values})


def loaded(depth, seed):
    transformers.set_seed(seed)
    return backbones.load(backbones.find(f"random-mlp-{depth}"), "random_mlp", 256)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3])
def test_the_layers_in_float64(depth):
    model, vectors = loaded(depth, 0)
    assert isinstance(model, RandomMLP)
    assert isinstance(vectors, RandomVectors)
    model.double()
    x, labels = vectors([[n, n] for n in range(7)]).double(), torch.arange(7)
    weights = [weight for name, weight in model.named_parameters()]
    assert [tuple(weight.shape) for weight in weights] == [(WIDTH, WIDTH)] * depth
    y = x
    for weight in weights[:-1]:
        y = torch.clamp(y @ weight.T, min=0)
    expected = y @ weights[-1].T @ model.classes.T
    output = model(hidden=x, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(expected, labels))


@torch.no_grad()
def test_depth_keeps_the_scale_and_the_classes_are_alike_at_the_start():
    for depth in (1, 8):
        model, vectors = loaded(depth, 3)
        seen = []
        model.layers[-1]["fc1"].register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
        logits = model(hidden=vectors([[n] for n in range(200)])).logits
        assert seen[0].std().item() == pytest.approx(2**0.5, rel=0.25)
        assert logits.std().item() < 0.2


def test_weights_follow_from_the_seed_and_vectors_from_the_key():
    (one, vectors), (other, _), (again, _) = (loaded(2, seed) for seed in (1, 2, 1))
    parts = [dict(model.state_dict()) for model in (one, other, again)]
    assert len(parts[0]) == 3, "two layers and the classes"
    for name, tensor in parts[0].items():
        assert torch.equal(tensor, parts[2][name])
        assert not torch.equal(tensor, parts[1][name])
    x = vectors([[1, 2], [1, 3], [1, 2]])
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])
    many = vectors([[n, n] for n in range(500)])
    assert (many.mean().item(), many.std().item()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.1), ("phi", 0.03)])
def test_every_layer_stores_facts(method, rate, tmp_path):
    result = run(config(3, method, train={"lr": rate, "max_steps": 40}), save_to=tmp_path)
    assert (result.status, result.headline) == ("finished", "bits")
    assert result.metrics["bits"] > 0.2 * 12 * 8
    assert set(result.modules) == {f"layers.{n}.fc1" for n in range(3)}
    assert result.metrics["parameters.factors"] == 3 * 2 * 2 * WIDTH


def test_facts_are_those_of_their_seed():
    one, other = (VectorFacts(DataSettings(facts=6)).of_seed(seed).train for seed in (1, 2))
    assert (len(one), one.inputs == other.inputs) == (6, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"weights": "bf16"}}, "'random-mlp-2' has random weights, in float32; train.weights must be fp32"),
        ({"data": {"facts": 12, "probes": 3}}, "'facts/vectors' reads no texts: data.probes must be 0, got 3"),
        ({"task": "facts"}, r"'random-mlp-2' \(random_mlp\) cannot store facts in a feed-forward block"),
        ({"task": "docstrings"}, r"'random-mlp-2' \(random_mlp\) cannot classify texts"),
        ({"backbone": "minilm"}, r"'minilm' \(bert\) cannot store facts in random layers .*, random-mlp-1, "),
    ],
)
def test_what_has_no_meaning_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        plan(config(**values))


def test_random_weights_are_nowhere_to_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = backbones.find("random-mlp-1")
    assert backbones.missing_weights(backbone) is None
    with pytest.raises(InputError, match=re.escape("backbone 'random-mlp-1' has random weights, which no file holds")):
        Checkpoint(backbone)
