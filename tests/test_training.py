"""One run on the embedded backbone and data: what it gives, what it costs, and determinism."""

from __future__ import annotations

import dataclasses
import json
import statistics

import pytest
import torch

from basisadapt.tasks import TASKS, Rows, TaskData, TextTask
from basisadapt.training import plan, run
from basisadapt.training.observation import Observer, observe
from basisadapt.training.trainer import arithmetic
from tests.short_runs import config


@pytest.mark.parametrize(("method", "modules"), [("lora", 12), ("phi", 36)])
def test_a_run_is_complete_and_repeats_bitwise(method, modules, small, tmp_path):
    """LoRA in a tiny encoder, φ in MiniLM."""
    chosen = (config if method == "phi" else small)(method=method, adapter={"r": 4, "dropout": 0.1})
    steps = []
    first = run(chosen, on_step=lambda step, total: steps.append((step, total)), save_to=tmp_path)
    second = run(chosen)
    assert steps == [(1, 3), (2, 3), (3, 3)]

    def repeated(result):
        measured = ("seconds.", "memory.", "tokens_per_second")
        metrics = {k: v for k, v in result.metrics.items() if not k.startswith(measured)}
        return metrics, result.curves, result.modules, result.phi, result.snapshots, result.landscape

    assert repeated(first) == repeated(second)
    assert first.status == "finished"
    assert {"accuracy", "eval_loss", "train_loss", "stable_rank.mean", "dc_share.mean"} <= first.metrics.keys()
    assert len(first.modules) == modules
    assert {m["kind"] for m in first.modules.values()} == {"attention", "mlp"}
    assert len(first.curves["loss"]) == 3
    assert [snapshot["step"] for snapshot in first.snapshots] == [0, 1, 2]
    assert set(first.snapshots[0]["stable_rank"].values()) == {0.0}, "B = 0: there is no update yet"
    attention = [m["stable_rank"] for m in first.modules.values() if m["kind"] == "attention"]
    assert first.metrics["stable_rank.attention.mean"] == pytest.approx(statistics.fmean(attention))
    assert first.curves["stable_rank.attention"][-1] == (3, first.metrics["stable_rank.attention.mean"])
    assert 0 < first.metrics["update_smoothness"] <= 1
    assert first.curves["update_smoothness"][-1] == (3, first.metrics["update_smoothness"])
    assert -1 < first.metrics["generalisation_gap"] < 1
    assert ("active_n.mean" in first.metrics) == (method == "phi")
    assert set(first.phi) == (set(first.modules) if method == "phi" else set())
    assert first.metrics["parameters.trainable"] == plan(chosen).trainable
    assert first.data["train_rows"] == 64
    assert first.environment["torch"]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    json.dumps(dataclasses.asdict(first), allow_nan=False)


def test_another_seed_gives_other_numbers(small):
    losses = {run(small(seed=seed)).metrics["eval_loss"] for seed in (1, 2)}
    assert len(losses) == 2


def test_observing_changes_no_number(monkeypatch, small):
    """Every step observed, and none: bitwise the same, over two verifications of the series, with dropout."""
    targets = ["layer.0.attention.self.query", "layer.1.output.dense"]
    chosen = small(train={"max_steps": 18}, adapter={"r": 2, "dropout": 0.1, "target_modules": targets})
    original = Observer.step

    def often(observer, step, total):
        original(observer, step, total)
        observe(observer._model, observer._method)

    monkeypatch.setattr(Observer, "step", often)
    watched = run(chosen)
    monkeypatch.setattr(Observer, "step", lambda *_: None)
    alone = run(chosen)
    assert watched.curves["loss"] == alone.curves["loss"]
    assert watched.metrics["eval_loss"] == alone.metrics["eval_loss"]
    assert watched.modules == alone.modules
    assert [len(result.snapshots) for result in (watched, alone)] == [3, 0]


def test_one_adapted_module_and_a_landscape(small):
    adapter = {"r": 2, "target_modules": ["layer.1.output.dense"]}
    result = run(small(train={"landscape": 3, "max_steps": 2, "lr": 0.05}, adapter=adapter))
    assert result.metrics["stable_rank.std"] == 0
    assert "stable_rank.attention.mean" not in result.metrics
    losses = result.landscape["loss"]
    assert result.landscape["axis"] == [-1, 0, 1]
    for line in [*losses, *zip(*losses, strict=True)]:  # two values may be equal in float32, three hardly
        assert len(set(line)) > 1, "both directions move the loss"
    plain = run(small(train={"max_steps": 2, "lr": 0.05}, adapter=adapter))
    assert plain.landscape == {}
    assert plain.modules == result.modules, "the parameters are put back"


def test_mixed_precision_trains(small):
    result = run(small(train={"precision": "bf16", "max_steps": 2}, adapter={"r": 4}))
    assert result.status == "finished"
    assert result.environment["torch"]


def test_tf32_is_a_precision_of_its_own_run():
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    with arithmetic("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with arithmetic("fp32"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()) == before


@pytest.mark.parametrize("method", ["lora", "head", "frozen"])
def test_to_look_for_the_sharpness_changes_nothing(method, small):
    found, plain = (
        run(small(method=method, adapter={"r": 1}, train={"sharpness": steps, "max_steps": 2})) for steps in (3, None)
    )
    assert "sharpness" not in plain.metrics
    assert found.metrics.get("sharpness", 0) > 0 or method == "frozen"
    assert found.curves.get("loss") == plain.curves.get("loss")


def test_best_checkpoint_and_early_stopping(small):
    result = run(small(train={"max_steps": 30, "eval_steps": 2, "patience": 1, "lr": 0.5}, adapter={"r": 2}))
    scores = [value for _, value in result.curves["eval_accuracy"]]
    assert len(scores) < 15, "it stopped early"
    assert result.metrics["accuracy"] == pytest.approx(max(scores))


def test_validation_rows_are_the_last_training_rows_and_not_trained_on(small):
    evaluated = set()

    class Numbered(TextTask, name="numbered_of_test"):
        """Every row's label is its number: from 0 those to train on, from 1000 those held out."""

        headline, num_labels = "score", 1

        def check(self, data_dir):
            pass

        def load(self, data_dir):
            train, held_out = range(40), range(1000, 1010)
            return TaskData(*(Rows([f"row {n}" for n in part], [float(n) for n in part]) for part in (train, held_out)))

        def metrics(self, scores, labels):
            evaluated.add(tuple(sorted(labels.reshape(-1).tolist())))
            return {"score": 0.0}

    try:
        short = {"max_steps": 2, "train_rows": 30, "batch_size": 4}
        chosen = small(task="numbered_of_test", method="head", train={**short, "validation": 0.2})
        result = run(chosen)
        assert evaluated == {tuple(range(24, 30)), tuple(range(24))}, "and training rows, for the gap"
        assert (result.data["train_rows"], result.data["eval_rows"]) == (24, 6)
        run(small(task="numbered_of_test", method="head", train=short))
        assert tuple(range(1000, 1010)) in evaluated
    finally:
        del TASKS._classes["numbered_of_test"]


def test_what_training_costs():
    """Full fine-tuning keeps two moments and a gradient of every weight, the head next to nothing."""
    found = {method: run(config(method=method)).metrics for method in ("full", "head")}
    assert all(metrics["tokens_per_second"] > 0 for metrics in found.values())
    if "memory.peak_bytes" not in found["full"]:
        pytest.skip("this system does not tell a process' peak memory")
    weights = 4 * found["full"]["parameters.trainable"]
    assert found["full"]["memory.peak_bytes"] > 3 * weights > 3 * found["head"]["memory.peak_bytes"] / 2
