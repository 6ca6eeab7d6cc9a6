"""φ(BA) as a peft method: start, training, merging, several adapters, saving, over every basis, grid and policy."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model

from basisadapt import InputError, PhiConfig
from basisadapt.adapter import PhiLinear
from basisadapt.phi.basis import BASES
from basisadapt.phi.grids import GRIDS
from basisadapt.phi.sharing import SHARING
from tests.conftest import randomise, tiny

# One setting at a time over the registries, so that a new plug-in is covered without a line here.
VARIANTS = [
    *({"basis": name} for name in sorted(BASES)),
    *({"grid": name} for name in sorted(GRIDS)),
    *({"sharing": name} for name in sorted(SHARING)),
    {"preset": "paper"},
    {"backend": "direct"},
    {"learn_omega": False},
    {"factor_init": "both"},
    {"amplitude_init": "identity", "identity_path": False},
    {"omega_init": "nyquist"},
    {"omega_init": "depth:0.5:2"},
    {"placement": "odd", "rest": "lora"},
    {"dropout": 0.1, "lora_alpha": 8.0},
]


def label(variant):
    return " ".join(f"{key}={value}" for key, value in variant.items())


variants = pytest.mark.parametrize("variant", VARIANTS, ids=label)
families = pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])


def adapted(base, seed=0, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(
        base, PhiConfig(**{"task_type": "SEQ_CLS", "r": 3, "num_basis": 10, "gain": 2.0, **settings})
    )
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def test_the_enum_has_exactly_one_new_member():
    assert PeftType("BASISADAPT_PHI") is PeftType["BASISADAPT_PHI"] is PeftType.BASISADAPT_PHI
    assert list(PeftType).count("BASISADAPT_PHI") == 1
    assert isinstance(PeftType.BASISADAPT_PHI, PeftType)
    assert copy.deepcopy(PeftType.BASISADAPT_PHI) is PeftType.BASISADAPT_PHI
    assert json.dumps({"peft_type": PeftType.BASISADAPT_PHI}) == '{"peft_type": "BASISADAPT_PHI"}'


@variants
def test_save_and_load(variant, bert, tokens, tmp_path):
    model = adapted(copy.deepcopy(bert), **variant)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path).eval()
    assert torch.equal(logits(model, tokens), logits(loaded, tokens))
    # Tensors mapped straight from the file lie at other addresses, which may change the last bit of a sum.
    mapped = PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path, low_cpu_mem_usage=True, torch_device="cpu").eval()
    torch.testing.assert_close(logits(model, tokens), logits(mapped, tokens), rtol=0, atol=1e-6)


@variants
def test_merge_and_unmerge(variant, bert, tokens):
    base = {name: value.clone() for name, value in bert.state_dict().items()}
    model = adapted(bert, **variant)
    expected = logits(model, tokens)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
    for name, value in model.base_model.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in base and "modules_to_save" not in name:
            assert torch.equal(value, base[plain]), name


@families
def test_merge_and_unload_is_a_plain_model(family, tokens, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = adapted(tiny(family))
    expected = logits(model, tokens)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if type(m).__module__.startswith(("basisadapt", "peft"))]
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-6)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(merged, tokens))
    assert (expected - logits(tiny(family), tokens)).abs().max() > 1e-3


@families
def test_unload_gives_the_base_back(family, tokens):
    base = tiny(family)
    expected = logits(base, tokens)
    model = adapted(base)
    assert torch.equal(logits(model.unload(), tokens), expected)


def test_a_new_process_needs_only_import_basisadapt(bert, tokens, tmp_path):
    model = adapted(copy.deepcopy(bert), basis="gaussian_rbf", grid="random", sharing="kind")
    bert.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens")
    program = f"""
import torch
{{imports}}
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    print(model(input_ids=torch.load({str(tmp_path / "tokens")!r})).logits.double().tolist())
"""

    def outcome(imports):
        command = [sys.executable, "-c", program.format(imports=imports)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    found = outcome("import basisadapt")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == logits(model, tokens).double().tolist()
    missing = outcome("")
    assert missing.returncode != 0
    assert "KeyError: 'BASISADAPT_PHI'" in missing.stderr


def test_residual_starts_exactly_as_lora(bert, tokens):
    labels = torch.tensor([0, 1, 2, 0])

    def first_step(config):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(bert).double(), config)
        output = model(input_ids=tokens, labels=labels)
        output.loss.backward()
        return model, output.logits.detach()

    names = r".*layer\.\d+\..*(query|key|value|dense)"
    phi, phi_logits = first_step(PhiConfig(preset="residual", r=3, target_modules=names))
    lora, lora_logits = first_step(LoraConfig(r=3, lora_alpha=3, target_modules=names))
    torch.testing.assert_close(phi_logits, lora_logits, rtol=1e-13, atol=1e-15)  # all but the rounding of F(0) = 0
    gradients = {
        n.replace("lora_", "phi_").replace(".weight", ""): p.grad for n, p in lora.named_parameters() if p.requires_grad
    }
    for name, parameter in phi.named_parameters():
        if "phi_A" in name or "phi_B" in name:
            torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-10, atol=1e-14)
    assert not gradients


@variants
def test_gradients_reach_every_trainable_parameter(variant, bert, tokens):
    model = adapted(bert, **variant).train()
    model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            unused = variant.get("basis") == "polynomial" and name.endswith("grid")
            assert unused or parameter.grad.abs().max() > 0, name


def test_several_adapters(bert, tokens):
    model = adapted(bert, seed=1, task_type=None)
    first = logits(model, tokens)
    model.add_adapter("second", PhiConfig(r=2, num_basis=5, basis="fourier", sharing="all"))
    assert torch.equal(logits(model, tokens), first), "adding an adapter changes nothing"
    assert not [n for n, p in model.named_parameters() if ".second" in n and p.requires_grad and "phi_" in n]
    randomise(model, 2)
    first = logits(model, tokens)
    model.set_adapter("second")
    second = logits(model, tokens)
    assert not torch.equal(first, second)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "phi_" in n}
    assert trainable
    assert all(".second" in name for name in trainable)

    model.base_model.set_adapter(["default", "second"])
    combined = logits(model, tokens)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), combined, rtol=0, atol=2e-6)
    model.unmerge_adapter()

    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), first)
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if ".second" in name]
    assert torch.equal(logits(model, tokens), first)


def test_disable_adapter(bert, tokens):
    expected = logits(bert, tokens)
    model = adapted(bert)
    enabled = logits(model, tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(logits(model, tokens), enabled)


def test_dropout_acts_while_training_only(bert, tokens):
    model = adapted(bert, dropout=0.5)
    assert torch.equal(logits(model, tokens), logits(model, tokens))
    for module in model.modules():
        if isinstance(module, PhiLinear):
            module.train()
    assert not torch.equal(logits(model, tokens), logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, bert, tokens):
    model = adapted(bert.to(dtype))
    output = logits(model, tokens)
    assert output.dtype == dtype
    assert output.isfinite().all()
    model.merge_adapter()
    loose = {torch.float64: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(logits(model, tokens), output, rtol=0, atol=loose)


def test_gradient_checkpointing_gives_the_same_gradients(bert, tokens):
    def gradients(checkpointing):
        model = adapted(copy.deepcopy(bert)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 33}, "r must be at most 32"),
        ({"r": 0}, "r must be at least 1"),
        ({"basis": "sink"}, "did you mean 'sinc'"),
        ({"grid": "unifrom"}, "did you mean 'uniform'"),
        ({"sharing": "omga"}, "did you mean 'omega'"),
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"placement": "attn"}, "placement"),
        ({"num_basis": 0}, "num_basis must be at least 1"),
        ({"interval": 0.0}, "interval must be above 0"),
        ({"omega_init": 0.0}, "omega_init must be above 0"),
        ({"omega_init": "nyquist", "num_basis": 1}, "omega_init must be above 0"),
        ({"omega_init": "nyqist"}, "omega_init must be"),
        ({"omega_init": "depth:0.5"}, "omega_init must be"),
        ({"omega_init": "depth:0:2"}, "omega_init must be"),
        ({"omega_init": "0.5:2"}, "omega_init must be"),
        ({"gain": float("nan")}, "gain"),
        ({"amplitude_init": "normal:x"}, "amplitude_init"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_settings_are_refused(settings, message, bert):
    with pytest.raises(InputError, match=message):
        get_peft_model(bert, PhiConfig(**settings))


def test_other_layers_are_refused(bert):
    with pytest.raises(InputError, match="Embedding"):
        get_peft_model(bert, PhiConfig(target_modules=["word_embeddings"]))


def test_safe_merge_refuses_before_anything_changes(bert):
    model = adapted(bert)
    layer = next(m for m in model.modules() if isinstance(m, PhiLinear))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.phi_A["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
