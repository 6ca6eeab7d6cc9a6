"""The contract of a method, over all that are registered: a new one is tested without a line here."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, PeftType
from safetensors.torch import load_file
from torch import nn

from basisadapt import InputError
from basisadapt.backbones import is_head
from basisadapt.core.registry import load_plugin
from basisadapt.diagnostics.figures import figures
from basisadapt.methods import METHODS
from basisadapt.study.plan.cells import resolve
from basisadapt.study.plan.reading import read_spec
from basisadapt.training import count_parameters, plan, run
from basisadapt.training.config import RunConfig
from basisadapt.training.observation import adapted_layers, adapter_parameters, observe
from tests.conftest import randomise, tiny

RANK = 4
# What a method cannot do, and the words of its refusal.
NO_MERGE = {"aurora": "acts on activations"}
PLAIN = {"frozen", "head", "full"}
DETACHED = {"dora"}  # takes the lengths of V's rows for constants, by design (Liu et al., section 4.3)


def of_factors(s, m, n):
    return s.r * (m + n)


def with_room(s, m, n):
    return math.ceil((1 + s.spare) * s.r) * (m + n + 1)


def _split(size):
    """KRAdapter's k₁ = ⌊√size⌋ and the least k₂ with k₁ k₂ ≥ size."""
    first = int(size**0.5)
    return first, next(second for second in range(1, size + 1) if first * second >= size)


# Trainable numbers in a module with a weight of (m, n); φ's tables, which modules may share, are counted apart.
FORMULAS = {
    **dict.fromkeys(PLAIN, lambda s, m, n: 0),
    **dict.fromkeys(("abba", "dylora", "hira", "lora", "phi", "pissa", "rslora", "sinelora"), of_factors),
    **dict.fromkeys(("adalora", "elalora"), with_room),
    "aurora": lambda s, m, n: s.r * (m + n + s.r + s.num_knots),
    "dora": lambda s, m, n: s.r * (m + n) + m,
    "loha": lambda s, m, n: 2 * s.r * (m + n),
    "kradapter": lambda s, m, n: min(m, n) * sum(_split(max(m, n))),
    "nola": lambda s, m, n: 2 * s.num_random,
    "randlora": lambda s, m, n: math.ceil(min(m, n) / s.r) * (s.r + min(m, n)),
    "vera": lambda s, m, n: s.r + m,
}

methods = pytest.mark.parametrize("name", list(METHODS))
learners = pytest.mark.parametrize("name", [name for name in METHODS if name != "frozen"])
adapters = pytest.mark.parametrize("name", [name for name in METHODS if name not in PLAIN])
ours = pytest.mark.parametrize(
    "name", [name for name in METHODS if f"BASISADAPT_{name.upper()}" in PeftType.__members__]
)


def settings_of(name, **values):
    return METHODS[name].settings(**{"r": RANK, **values})


def attached(name, base=None, seed=0, **values):
    torch.manual_seed(seed)
    base = tiny("bert") if base is None else base
    return METHODS[name]().attach(base, settings_of(name, **values), "SEQ_CLS")


def counted(name):
    method, settings = METHODS[name](), settings_of(name)
    model = method.attach(tiny("bert"), settings, "SEQ_CLS")
    return count_parameters(model, method.parameter_groups(model, settings, 1e-3))


def trained(name, tokens, steps=3, base=None, **values):
    """A model after some steps of AdamW, in evaluation mode; the names of what has had a gradient."""
    model, method, settings = attached(name, base, **values), METHODS[name](), settings_of(name, **values)
    if name == "frozen":
        return model.eval(), set()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels, reached = torch.arange(len(tokens)) % 3, set()
    for step in range(1, steps + 1):
        model.train()
        model(input_ids=tokens, labels=labels).loss.backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        method.before_step(model, settings, step, steps)
        optimiser.step()
        method.after_step(model, settings, step, steps)
        optimiser.zero_grad()
    return model.eval(), reached


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(input_ids=tokens).logits


@methods
def test_training_starts_at_the_pretrained_function(name, tokens):
    torch.testing.assert_close(logits(attached(name), tokens), logits(tiny("bert"), tokens), rtol=0, atol=2e-6)


@learners
def test_gradients_reach_every_trainable_tensor_within_three_steps(name, tokens):
    model, reached = trained(name, tokens)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    unused = {n for n in trainable if "embeddings" in n or "_b_" in n or n.endswith("key.bias")}  # no row or no effect
    assert trainable - reached <= unused
    assert trainable - unused, "something trains"


@methods
def test_counts_by_formula_and_by_model_agree(name):
    found, settings, layers = counted(name), settings_of(name), adapted_layers(attached(name))
    formula = sum(FORMULAS[name](settings, layer.out_features, layer.in_features) for _, layer in layers)
    assert found.modules == (0 if name in PLAIN else 12)
    if name == "full":
        assert found.trainable == found.total == sum(p.numel() for p in tiny("bert").parameters())
    else:
        assert found.factors == formula
    assert found.head == (name != "frozen") * sum(p.numel() for n, p in tiny("bert").named_parameters() if is_head(n))


@adapters
def test_save_and_load_give_the_same_function(name, tokens, tmp_path):
    model, _ = trained(name, tokens)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # what is drawn on the way must not matter
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-6)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    extra = sum(tensor.numel() for n, tensor in saved.items() if "phi_bank" in n)  # φ's file alone defines φ
    assert trainable <= sum(tensor.numel() for tensor in saved.values()) <= trainable + extra, "nothing frozen is saved"


@adapters
def test_from_meta_to_a_device(name, tokens, tmp_path):
    """Made empty, and filled from the file."""
    model, _ = trained(name, tokens)
    model.save_pretrained(tmp_path)
    if name == "pissa":  # peft takes it for a start that needs W's decomposition
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            PeftModel.from_pretrained(tiny("bert"), tmp_path, low_cpu_mem_usage=True, torch_device="cpu")
        return
    lean = PeftModel.from_pretrained(tiny("bert"), tmp_path, low_cpu_mem_usage=True, torch_device="cpu")
    torch.testing.assert_close(logits(lean, tokens), logits(model, tokens), rtol=0, atol=1e-6)


@ours
def test_an_offloaded_model_is_the_same_function(name, tokens):
    model, _ = trained(name, tokens)
    expected = logits(model, tokens)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-6)


@methods
def test_to_another_dtype_and_back(name, tokens):
    model, _ = trained(name, tokens)
    expected = logits(model, tokens)
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model, tokens), expected.double(), rtol=0, atol=1e-6)
    assert torch.equal(logits(model.float(), tokens), expected)
    assert {p.dtype for p in model.bfloat16().parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model, tokens).float(), expected, rtol=0, atol=5e-3)


@methods
def test_to_a_gpu_and_back(name, tokens):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, _ = trained(name, tokens)
    expected = logits(model, tokens)
    on_gpu = logits(model.cuda(), tokens.cuda())
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=0, atol=1e-4)
    for _, layer in adapted_layers(model):
        change = METHODS[name]().weight_change(layer)
        assert change is None or change.is_cuda
    assert torch.equal(logits(model.cpu(), tokens), expected)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_plain_model_is_saved_as_a_plain_model(name, tokens, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model, _ = trained(name, tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-6)


@adapters
def test_merging_is_exact_or_refused_with_a_reason(name, tokens):
    model, _ = trained(name, tokens)
    model = model.double()
    expected = logits(model, tokens)
    assert (expected - logits(tiny("bert").double(), tokens)).abs().max() > 1e-3
    if name in NO_MERGE:
        with pytest.raises(InputError, match=NO_MERGE[name]):
            model.merge_and_unload()
        return
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-6)
    merged = model.merge_and_unload()
    assert not list(adapted_layers(merged))
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@ours
def test_a_refused_merge_leaves_the_whole_model_as_it_was(name, merge, tokens):
    """The last layer refuses; those before it could be merged."""
    model, _ = trained(name, tokens)
    *_, (_, last) = adapted_layers(model)
    with torch.no_grad():
        last.base_layer.weight[0, 0] = float("nan")
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=NO_MERGE.get(name, "gives NaN or infinite weights")):
        getattr(model, merge)(safe_merge=True)
    assert list(model.modules()) == modules
    assert not [module for module, layer in adapted_layers(model) if layer.merged]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@adapters
def test_the_recorded_change_is_that_of_the_layer(name, tokens):
    """x ΔWᵀ = layer(x) − pretrained layer(x), in float64; AuroRA has no ΔW."""
    model = trained(name, tokens)[0].double()
    method, pretrained = METHODS[name](), tiny("bert").double()
    for module, layer in adapted_layers(model):
        change = method.weight_change(layer)
        if change is None:
            assert name in NO_MERGE
            continue
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        difference = layer(x) - pretrained.get_submodule(module)(x)
        torch.testing.assert_close(x @ change.double().T, difference, rtol=1e-6, atol=1e-6)


@adapters
def test_gradients_of_a_layer_are_right(name, tokens):
    """Against central differences along a random direction in every tensor, in float64."""
    model = trained(name, tokens)[0].double()
    layer = next(layer for _, layer in adapted_layers(model))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(3, layer.out_features, dtype=torch.float64, generator=generator)
    own = [p for p in layer.parameters() if p.requires_grad]
    tensors = [x] if name in DETACHED else [x, *own]
    gradients = torch.autograd.grad((layer(x) * weights).sum(), tensors)

    @torch.no_grad()
    def at(tensor, step):
        tensor.add_(step)
        value = (layer(x) * weights).sum().item()
        tensor.sub_(step)
        return value

    for tensor, gradient in zip(tensors, gradients, strict=True):
        step = 1e-5 * torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        numeric = (at(tensor, step) - at(tensor, -step)) / 2
        assert (gradient * step).sum().item() == pytest.approx(numeric, rel=1e-4, abs=1e-12)


@adapters
def test_several_adapters_add_up_and_switch(name, tokens):
    """A fresh one changes nothing, alone or beside a trained one."""
    model, _ = trained(name, tokens)
    first = logits(model, tokens)
    layers = [layer for _, layer in adapted_layers(model)]
    ones = [torch.ones(1, layer.in_features) for layer in layers]
    one = [layer(x) for layer, x in zip(layers, ones, strict=True)]
    config = copy.deepcopy(model.peft_config["default"])
    if name == "adalora":
        with pytest.raises(ValueError, match="only 1 trainable adapter"):  # peft's
            model.add_adapter("second", config)
        config.inference_mode = True
    model.add_adapter("second", config)
    for layer in layers:
        layer.set_adapter(["default", "second"])
    both = [layer(x) for layer, x in zip(layers, ones, strict=True)]
    torch.testing.assert_close(both, one, rtol=0, atol=1e-6)
    model.set_adapter("second")
    if name == "pissa":  # each took its part out of W: alone, it lacks the other's
        assert not any(torch.allclose(layer(x), y) for layer, x, y in zip(layers, ones, one, strict=True))
        model.set_adapter("default")
        assert not torch.allclose(logits(model, tokens), first, rtol=0, atol=1e-6)
        return
    fresh = [layer(x) for layer, x in zip(layers, ones, strict=True)]
    plain = [layer.get_base_layer()(x) for layer, x in zip(layers, ones, strict=True)]
    torch.testing.assert_close(fresh, plain, rtol=0, atol=1e-6)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, tokens), first, rtol=0, atol=1e-6)
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model, tokens), first, rtol=0, atol=1e-6)


@ours
def test_batches_of_mixed_adapters_are_refused(name, tokens):
    model = attached(name)
    _, layer = next(iter(adapted_layers(model)))
    mixed = {"adapter_names": ["default"] * len(tokens)}
    with pytest.raises(InputError, match=r"does not support batches of mixed adapters \(adapter_names\)"):
        model(input_ids=tokens, **mixed)
    with pytest.raises(InputError, match=r"does not support batches of mixed adapters \(adapter_names\)"):
        layer(torch.zeros(len(tokens), layer.in_features), **mixed)


@adapters
def test_disabling_gives_the_base_layer_back(name, tokens):
    """Which is the pretrained one, but for PiSSA's: W less its principal part."""
    model, _ = trained(name, tokens)
    layer = next(layer for _, layer in adapted_layers(model))
    x = torch.ones(2, layer.in_features)
    base = layer.get_base_layer()(x)
    assert not torch.equal(layer(x), base)
    pretrained = tiny("bert").get_submodule(next(module for module, _ in adapted_layers(model)))(x)
    assert torch.equal(base, pretrained) == (name != "pissa")
    model.disable_adapter_layers()
    assert torch.equal(layer(x), base)


@adapters
def test_half_precision_trains(name, tokens):
    model, reached = trained(name, tokens, base=tiny("bert").bfloat16())
    assert reached
    assert logits(model, tokens).isfinite().all()
    assert {p.dtype for p in adapter_parameters(model).values()} <= {torch.float32, torch.bfloat16}


@learners
def test_checkpointing_changes_no_gradient(name, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = attached(name)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(5)
        model(input_ids=tokens, labels=torch.arange(len(tokens)) % 3).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-6)


@methods
def test_observing_draws_nothing(name, tokens):
    model, _ = trained(name, tokens)
    model.train()
    state = torch.get_rng_state()
    modules, _ = observe(model, METHODS[name]())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(modules) == (0 if name in {*PLAIN, *NO_MERGE} else 12)


@methods
def test_a_configuration_keeps_its_own_settings_and_checks_the_others(name):
    chosen = RunConfig.from_mapping({"method": name, "adapter": {"r": 2, "basis": "fourier"}})
    assert isinstance(chosen.adapter, METHODS[name].settings)
    assert RunConfig.from_mapping(chosen.to_mapping()) == chosen
    with pytest.raises(InputError, match="did you mean 'sinc'"):
        RunConfig.from_mapping({"method": name, "adapter": {"basis": "sink"}})


def test_the_guides_method_is_one_file(tokens, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "PeftMethod" in block)
    (tmp_path / "loha.py").write_text(code, encoding="utf-8")
    load_plugin(str(tmp_path / "loha.py"))
    try:
        test_training_starts_at_the_pretrained_function("loha", tokens)
        test_gradients_reach_every_trainable_tensor_within_three_steps("loha", tokens)
        test_counts_by_formula_and_by_model_agree("loha")
        test_save_and_load_give_the_same_function("loha", tokens, tmp_path)
        test_merging_is_exact_or_refused_with_a_reason("loha", tokens)
    finally:
        del METHODS._classes["loha"]


def test_the_comparison_gives_every_method_loras_budget():
    """Within an eighth, by the formulas; the two that the study names as smaller are. KRAdapter's size is given."""
    rows = resolve(read_spec("compare_methods")).rows
    shapes = [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6
    counts = {}
    for row in rows:
        config = row.cells[0].config
        counts[config.method] = sum(FORMULAS[config.method](config.adapter, m, n) for m, n in shapes)
    assert counts.keys() == set(METHODS) - {"frozen", "kradapter"}, "every method that can have a row has one"
    off = {name for name, count in counts.items() if abs(count / counts["lora"] - 1) > 0.126}
    assert off == {"head", "full", "vera", "nola"}


def test_nothing_trains_where_the_method_is_frozen():
    found = counted("frozen")
    assert found.trainable == 0
    assert found.total == sum(p.numel() for p in tiny("bert").parameters())


def test_head_is_refused_where_there_is_none():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny("llama").config)
    with pytest.raises(InputError, match="this model has none; frozen trains nothing"):
        METHODS["head"]().attach(model, settings_of("head"), "CAUSAL_LM")


def gradients_before_step(tokens, step, **values):
    """φ's tables, and their gradients as the optimiser gets them in one of ten steps."""
    model, settings = attached("phi", **values), settings_of("phi", **values)
    randomise(model)
    model(input_ids=tokens, labels=torch.arange(len(tokens)) % 3).loss.backward()
    METHODS["phi"]().before_step(model, settings, step, 10)
    return model.base_model.phi_bank["default"]


def test_phi_rests_while_it_is_told_to(tokens):
    rests = [gradients_before_step(tokens, step, transfer_delay=0.3) for step in (1, 3, 4)]
    assert [{p.grad is None for p in bank.parameters()} for bank in rests] == [{True}, {True}, {False}]


def test_a_rough_phi_has_its_price(tokens):
    plain, priced = (gradients_before_step(tokens, 1, smoothing=price) for price in (0.0, 0.7))
    own = [after.grad - before.grad for before, after in zip(plain.parameters(), priced.parameters(), strict=True)]
    expected = [0.7 * gradient for gradient in torch.autograd.grad(plain.roughness(), list(plain.parameters()))]
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_where_nothing_that_it_has_trains_a_rough_phi_costs_nothing(tokens):
    still = {"smoothing": 1.0, "amplitude_init": "fan_in", "learn_omega": False}
    assert not list(gradients_before_step(tokens, 1, **still).parameters())
    (log_gain,) = gradients_before_step(tokens, 1, gain="learned:2", **still).parameters()
    assert log_gain.grad is not None


@pytest.mark.parametrize("settings", [{"transfer_delay": 1.0}, {"smoothing": 1e4}, {"gain": "normalised:1"}])
def test_a_run_in_which_phi_is_held_back(settings, encoder):
    train = {"max_steps": 4, "train_rows": 16, "eval_rows": 8, "batch_size": 4, "lr": 1e-2}
    free, held = (
        run(RunConfig.from_mapping({"backbone": encoder, "adapter": {"r": 2, **chosen}, "train": train}))
        for chosen in ({}, settings)
    )
    assert held.status == "finished"
    if "transfer_delay" in settings:
        assert held.metrics["alpha.mean_abs"] == 0 < free.metrics["alpha.mean_abs"]
        assert held.metrics["active_n.mean"] == 0
    if "gain" in settings:  # φ's argument reaches a few root mean squares of BA
        assert 0.3 < held.metrics["range.share"] < 10


@pytest.mark.parametrize("name", ["frozen", "head", "full", "adalora"])
def test_a_run_of_a_method_without_delta_or_with_a_schedule(name, encoder, tmp_path: Path):
    train = {"max_steps": 3, "eval_steps": 1, "train_rows": 16, "eval_rows": 8, "batch_size": 4}
    chosen = RunConfig.from_mapping({"backbone": encoder, "method": name, "adapter": {"r": 2}, "train": train})
    result = run(chosen, save_to=tmp_path)
    assert result.status == "finished"
    assert result.metrics["parameters.trainable"] == plan(chosen).trainable
    assert result.metrics["adapter.bytes"] == (tmp_path / next(tmp_path.glob("*.safetensors"))).stat().st_size
    assert ("stable_rank.mean" in result.metrics) == (name == "adalora")
    learned = name != "frozen"
    assert ("train_loss" in result.metrics) == ("loss" in result.curves) == learned
    assert bool(figures(name, dataclasses.asdict(result))) == learned
